// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// helloPatience is how long a connection may take for its hello: the server is for measuring, not for the Internet, but
// must not keep every port scan for good.
const helloPatience = 10 * time.Second

// Serve answers the connections of the listeners until ctx ends: reply bytes to the hello, and to each request what it
// asks for. It closes the listeners.
func Serve(ctx context.Context, reply int, listeners ...net.Listener) error {
	if reply < 1 || reply > 1<<30 {
		return fmt.Errorf("a reply of %d bytes: between 1 and 1 GiB", reply)
	}
	s, err := newSocketServer(reply)
	if err != nil {
		return err
	}
	defer func() { _ = s.zeros.Close() }()
	stop := context.AfterFunc(ctx, func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	})
	defer stop()
	errs := make([]error, len(listeners))
	var all sync.WaitGroup
	for i, l := range listeners {
		all.Go(func() { errs[i] = s.accept(ctx, l) })
	}
	all.Wait()
	return errors.Join(errs...)
}

type socketServer struct {
	reply []byte   // to a hello
	zeros *os.File // what answers consist of
	path  string   // of zeros, to open it once more
}

// zerosBytes is the size of the file that answers are sent from, over and over.
const zerosBytes = 1 << 20

func newSocketServer(reply int) (*socketServer, error) {
	fd, err := unix.MemfdCreate("answers", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("a file in memory for the answers: %w", err)
	}
	s := &socketServer{
		reply: make([]byte, reply), zeros: os.NewFile(uintptr(fd), "answers"),
		path: "/proc/self/fd/" + strconv.Itoa(fd),
	}
	return s, s.zeros.Truncate(zerosBytes)
}

func (s *socketServer) accept(ctx context.Context, l net.Listener) error {
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ECONNABORTED):
			time.Sleep(10 * time.Millisecond)
		case err != nil:
			return err
		default:
			go s.serve(ctx, conn)
		}
	}
}

// serve answers one connection. What goes wrong is the client's to count.
func (s *socketServer) serve(ctx context.Context, conn net.Conn) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(helloPatience))
	r := bufio.NewReaderSize(conn, 2048)
	if err := readHello(r); err != nil {
		return
	}
	if _, err := conn.Write(s.reply); err != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	for {
		wanted, err := readRequest(r)
		if err != nil {
			return
		}
		if err := s.answer(conn, wanted); err != nil {
			return
		}
	}
}

// readHello reads records up to the end of the first handshake message (RFC 8446, sections 4 and 5.1).
func readHello(r *bufio.Reader) error {
	const handshake, header, most = 22, 5, 1 << 16
	need, got := 4, 0
	var start []byte
	for got < need {
		var h [header]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint16(h[3:]))
		if h[0] != handshake || n == 0 || n > maxRecord {
			return errors.New("not a TLS handshake record")
		}
		if want := min(4-len(start), n); want > 0 {
			part, err := r.Peek(want)
			if err != nil {
				return err
			}
			start = append(start, part...)
		}
		if len(start) == 4 {
			need = 4 + int(binary.BigEndian.Uint32(start)&0xffffff)
		}
		if need > most {
			return fmt.Errorf("a handshake message of %d bytes", need)
		}
		if _, err := r.Discard(n); err != nil {
			return err
		}
		got += n
	}
	return nil
}

// readRequest reads one record and returns how many bytes it asks for.
func readRequest(r *bufio.Reader) (wanted uint64, err error) {
	h, err := r.Peek(requestHeader)
	if err != nil {
		return 0, err
	}
	n := 5 + int(binary.BigEndian.Uint16(h[3:]))
	if h[0] != 23 || n < requestHeader || n > 5+maxRecord {
		return 0, errors.New("not a request")
	}
	wanted = binary.BigEndian.Uint64(h[5:])
	_, err = r.Discard(n)
	return wanted, err
}

// answer sends so many bytes: few by one write, many from a file, which the kernel sends without copying.
func (s *socketServer) answer(conn net.Conn, wanted uint64) error {
	const few = 64 << 10
	if wanted <= few {
		_, err := conn.Write(fewZeros[:wanted])
		return err
	}
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for wanted > 0 {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		n, err := io.CopyN(conn, f, int64(min(wanted, zerosBytes)))
		if err != nil {
			return err
		}
		wanted -= uint64(n)
	}
	return nil
}

var fewZeros [64 << 10]byte
