// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

func (r *reader) listen(node ast.Node) {
	items := r.items(node)
	if len(items) == 0 {
		r.refuse(r.at(node), "listen is empty", "write listen: \":443\"")
	}
	byAddr := map[netip.AddrPort]*Listener{}
	for _, item := range items {
		l, ok := r.listener(item)
		if !ok {
			if l.Name != "" {
				r.refusedListeners[l.Name] = true
			}
			continue
		}
		if first := byAddr[l.Addr]; first != nil {
			r.refuse(l.Pos, fmt.Sprintf("listener %s takes the same address as the one on line %d", l.Name, first.Pos.Line), "remove one")
			r.refusedListeners[l.Name] = true
			continue
		}
		if first := r.listeners[l.Name]; first != nil {
			r.refuse(l.Pos, fmt.Sprintf("listener name %q is taken by line %d", l.Name, first.Pos.Line), "choose another name")
			continue
		}
		l.Index = len(r.config.Listeners)
		r.config.Listeners = append(r.config.Listeners, l)
		byAddr[l.Addr], r.listeners[l.Name] = l, l
	}
}

// listener reads an address, or a mapping around one. The Listener is never
// nil, so that a refused one still tells its name.
func (r *reader) listener(node ast.Node) (*Listener, bool) {
	l := &Listener{Pos: r.at(node)}
	before := len(r.problems)
	address := ""
	readAddress := func(n ast.Node) {
		s, ok := r.scalar(n, "a listen address")
		if !ok {
			return
		}
		address = s.text
		l.Addr, _ = r.listenAddress(s)
	}
	ownNoMatch := false
	if _, plain := scalarText(node); plain {
		readAddress(node)
	} else {
		seen := r.mapping(node, "a listener", []field{
			{key: "name", read: func(n ast.Node) { l.Name = r.label(n, "listener name") }},
			{key: "address", read: readAddress},
			{key: "no_match", read: r.actionInto(&l.NoMatch, "no_match")},
			{key: "accept_proxy", read: func(n ast.Node) { r.acceptProxy(n, l) }},
		})
		if seen != nil {
			if _, ok := seen["address"]; !ok {
				r.refuse(l.Pos, "the listener has no address", "add address: \":443\"")
			}
			_, ownNoMatch = seen["no_match"]
		}
	}
	if !ownNoMatch {
		// The file's no_match may stand below; its pool may too.
		r.later = append(r.later, func() { l.NoMatch = r.config.NoMatch })
	}
	if l.Name == "" {
		l.Name = address
	}
	return l, len(r.problems) == before
}

func (r *reader) acceptProxy(node ast.Node, l *Listener) {
	for _, item := range r.items(node) {
		s, ok := r.scalar(item, "accept_proxy")
		if !ok {
			continue
		}
		if prefix, ok := r.network(s, "accept_proxy"); ok {
			l.AcceptProxy = append(l.AcceptProxy, prefix)
		}
	}
}

// listenAddress reads ":443", "192.0.2.1:443" or "[2001:db8::1]:443".
func (r *reader) listenAddress(s scalar) (netip.AddrPort, bool) {
	host, port, ok := r.hostPort(s, "listen address", "\":443\"")
	if !ok {
		return netip.AddrPort{}, false
	}
	if host == "" {
		return netip.AddrPortFrom(netip.Addr{}, port), true
	}
	addr, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		r.refuse(s.pos, fmt.Sprintf("listen address %q is not an IP address", host), "write it as \"192.0.2.1:443\", or \":443\" for every address")
	case addr.IsUnspecified():
		r.refuse(s.pos, fmt.Sprintf("listen address %q is no address", host),
			fmt.Sprintf("write \":%d\" for every address of both families", port))
	case !r.plainAddr(s, addr):
	case addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		r.refuse(s.pos, fmt.Sprintf("listen address %q is not one machine's", host), "TCP needs a unicast address")
	default:
		return netip.AddrPortFrom(addr, port), true
	}
	return netip.AddrPort{}, false
}

// hostPort splits an address with a port. An example shows the wanted form.
func (r *reader) hostPort(s scalar, what, example string) (host string, port uint16, ok bool) {
	bare := s.text
	if strings.HasPrefix(bare, "[") && strings.HasSuffix(bare, "]") {
		bare = bare[1 : len(bare)-1]
	}
	if addr, err := netip.ParseAddr(bare); err == nil {
		remedy := fmt.Sprintf("write \"%s:443\"", addr)
		if addr.Is6() {
			// 2001:db8::1:443 is a whole address too, so the example is not made
			// from what stands there.
			remedy = "write IPv6 in brackets, then the port: \"[2001:db8::1]:443\""
		}
		r.refuse(s.pos, fmt.Sprintf("%s %q has no port", what, s.text), remedy)
		return "", 0, false
	}
	colon := strings.LastIndexByte(s.text, ':')
	if colon < 0 {
		remedy := "write it as " + example
		if _, err := decimal(s.text); err == nil {
			remedy = fmt.Sprintf("a port alone is written %q, quoted and with its colon", ":"+s.text)
		}
		r.refuse(s.pos, fmt.Sprintf("%s %q has no port", what, s.text), remedy)
		return "", 0, false
	}
	host, digits := s.text[:colon], s.text[colon+1:]
	number, err := decimal(digits)
	if err != nil || number < 1 || number > 65535 {
		r.refuse(s.pos, fmt.Sprintf("%s %q has no valid port", what, s.text), "a port is a number from 1 to 65535")
		return "", 0, false
	}
	switch inner, bracketed := strings.CutPrefix(host, "["); {
	case bracketed && strings.HasSuffix(inner, "]"):
		host = strings.TrimSuffix(inner, "]")
		if !strings.Contains(host, ":") {
			r.refuse(s.pos, fmt.Sprintf("%s %q has brackets around something that is not IPv6", what, s.text), "write it as "+example)
			return "", 0, false
		}
	case strings.Contains(host, ":"):
		r.refuse(s.pos, fmt.Sprintf("%s %q is ambiguous: where does the port begin?", what, s.text),
			"write IPv6 in brackets: \"["+strings.Trim(host, "[]")+"]:"+strconv.FormatInt(number, 10)+"\"")
		return "", 0, false
	}
	return host, uint16(number), true
}

// plainAddr refuses spellings of an address that no packet carries.
func (r *reader) plainAddr(s scalar, addr netip.Addr) bool {
	switch {
	case addr.Zone() != "":
		r.refuse(s.pos, fmt.Sprintf("address %q has a zone", addr), "use a routable address: a zone means something else on every machine")
	case addr.Is4In6():
		r.refuse(s.pos, fmt.Sprintf("address %q is IPv4 written as IPv6", addr), "write "+addr.Unmap().String())
	default:
		return true
	}
	return false
}
