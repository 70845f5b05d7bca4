// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"
)

// Cert is a self-signed certificate made for one run.
type Cert struct {
	TLS     tls.Certificate
	Pool    *x509.CertPool // trusts just this certificate
	CertPEM []byte
	KeyPEM  []byte
}

// NewCert makes a certificate for the given DNS names.
func NewCert(names ...string) (*Cert, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: "snilb test-bed"},
		DNSNames:     names,
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		// curl's and GnuTLS's view of "trust this one": it must be its own authority.
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	c := &Cert{
		CertPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		KeyPEM:  pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}),
		Pool:    x509.NewCertPool(),
	}
	c.Pool.AppendCertsFromPEM(c.CertPEM)
	c.TLS, err = tls.X509KeyPair(c.CertPEM, c.KeyPEM)
	return c, err
}

// Backend is an HTTPS server in this process that says who it is:
//
//	GET /             "NAME SNI ALPN CLIENT-ADDRESS"
//	GET /big?n=BYTES  that many bytes, with their SHA-256 in the trailer X-Sha256
//	PUT /upload       answers "COUNT SHA-256" of the body
type Backend struct {
	Name  string
	Addr  netip.AddrPort
	Conns atomic.Int64 // accepted so far

	srv *http.Server
}

// StartBackend serves on addr in ns until Close.
func StartBackend(ns *NS, name string, addr netip.AddrPort, cert *Cert) (*Backend, error) {
	l, err := ns.Listen("tcp", addr.String())
	if err != nil {
		return nil, fmt.Errorf("backend %s: %w", name, err)
	}
	b := &Backend{Name: name, Addr: addr}
	mux := http.NewServeMux()
	mux.HandleFunc("/", b.whoami)
	mux.HandleFunc("/big", b.big)
	mux.HandleFunc("/upload", b.upload)
	b.srv = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that hang up in the handshake are part of the tests
		ConnState:         b.count,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert.TLS}, NextProtos: []string{"h2", "http/1.1"}},
	}
	go func() { _ = b.srv.ServeTLS(l, "", "") }() // ends by Close
	return b, nil
}

// Close cuts all connections.
func (b *Backend) Close() error { return b.srv.Close() }

// Shutdown lets them finish first.
func (b *Backend) Shutdown(ctx context.Context) error { return b.srv.Shutdown(ctx) }

func (b *Backend) count(_ net.Conn, state http.ConnState) {
	if state == http.StateNew {
		b.Conns.Add(1)
	}
}

func (b *Backend) whoami(w http.ResponseWriter, r *http.Request) {
	_, _ = fmt.Fprintf(w, "%s %q %q %s\n", b.Name, r.TLS.ServerName, r.TLS.NegotiatedProtocol, r.RemoteAddr)
}

func (b *Backend) big(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Trailer", "X-Sha256")
	hash := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(w, hash), Noise(uint64(n)), n); err != nil {
		panic(http.ErrAbortHandler) // the client must not mistake what it has for the whole
	}
	w.Header().Set("X-Sha256", hex.EncodeToString(hash.Sum(nil)))
}

func (b *Backend) upload(w http.ResponseWriter, r *http.Request) {
	hash := sha256.New()
	n, err := io.Copy(hash, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	_, _ = fmt.Fprintf(w, "%d %x\n", n, hash.Sum(nil))
}

// Noise is an endless stream of bytes that depends on seed alone: a repeated or lost block never goes unseen.
func Noise(seed uint64) io.Reader {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return mrand.NewChaCha8(key)
}
