// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// Changes come in bursts: an interface that comes up brings a dozen.
	settleTime = 50 * time.Millisecond
	// A resync takes at most this part of the time, however fast routes change.
	resyncShare = 5

	resubscribePause = time.Second
	followBuffer     = 1 << 20
)

// What may change a next hop, a listener's addresses, or where programs belong.
var followed = []uint{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	unix.RTNLGRP_NEXTHOP,
}

// Run follows the network until ctx ends or Close is called, and then returns nil: addresses come and
// go at wildcard listeners, routes move next hops and backends, interfaces that come
// back get their programs again.
func (i *Instance) Run(ctx context.Context) error {
	i.mu.Lock()
	if i.closed {
		i.mu.Unlock()
		return nil
	}
	i.runs.Add(1)
	i.mu.Unlock()
	defer i.runs.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(i.ctx, cancel)()

	var neighbours sync.WaitGroup
	defer neighbours.Wait()
	if i.neighbours != nil {
		neighbours.Go(func() { i.again(ctx, "neighbours", i.neighbours.follow) })
	}
	i.again(ctx, "network changes", i.follow)
	return nil
}

// again follows something until ctx ends, with one subscription after the other.
func (i *Instance) again(ctx context.Context, what string, follow func(context.Context) error) {
	for {
		err := follow(ctx)
		if ctx.Err() != nil {
			return
		}
		i.log.Warn("subscription to "+what+" ended: subscribing again", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(resubscribePause):
		}
	}
}

// follow is one subscription's life. What a message says is not looked at: it means
// that something changed, and the kernel is asked for all of it, so that a lost
// message loses nothing.
func (i *Instance) follow(ctx context.Context) error {
	socket, err := i.subscribe(i.ns)
	if err != nil {
		return err
	}
	defer socket.Close()
	changed, ended := make(chan struct{}, 1), make(chan error, 2)
	go i.receive(socket, changed, ended)
	if i.opts.usesNative() {
		drivers, err := subscribeToDrivers(i.ns)
		if err != nil {
			return err
		}
		if drivers != nil {
			defer drivers.Close()
			go i.receive(drivers, changed, ended)
		}
	}

	i.cache.flush() // what changed before the subscription
	for {
		began := time.Now()
		i.resync(ctx)
		pause := max(settleTime, resyncShare*time.Since(began))
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			return err
		case <-changed:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// changes is the subscription's socket.
type changes interface {
	Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error)
	Close()
}

func subscribe(ns *namespace) (changes, error) { return subscribeTo(ns, followed...) }

func subscribeTo(ns *namespace, groups ...uint) (changes, error) {
	var socket *nl.NetlinkSocket
	err := ns.do(func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_ROUTE, groups...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("subscribe to network changes: %w", err)
	}
	// That it stays small costs a resync more now and then.
	_ = socket.SetReceiveBufferSize(followBuffer, false)
	return socket, nil
}

// receive runs until the socket is closed or broken; one that overflowed (ENOBUFS) is
// neither. Caches are flushed and programs attached at once, all else waits until the
// burst is over.
func (i *Instance) receive(socket changes, changed chan<- struct{}, ended chan<- error) {
	for {
		messages, _, err := socket.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			ended <- err
			return
		}
		i.cache.flush()
		if slices.ContainsFunc(messages, isOfLink) {
			i.relink()
		}
		select {
		case changed <- struct{}{}:
		default: // one is waiting already
		}
	}
}

func isOfLink(m syscall.NetlinkMessage) bool {
	return m.Header.Type == unix.RTM_NEWLINK || m.Header.Type == unix.RTM_DELLINK
}

// relink has an interface that is back get its programs before its first packets come,
// which the stack would answer by resets. What fails is for resync to say.
func (i *Instance) relink() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return
	}
	_ = i.forgetDead()
	if i.serving {
		_ = i.reattach()
	}
}

// resync asks the kernel for everything that Run follows. Errors are logged: the
// next change, or a packet, tries again.
func (i *Instance) resync(ctx context.Context) {
	if err := i.resyncInterfaces(); err != nil {
		i.log.Error("follow interfaces", "error", err)
	}
	// Backends first: bound flows may go a new way only when answers are expected there.
	for _, addr := range i.backends.addresses() {
		if ctx.Err() != nil {
			return
		}
		problem := ""
		if _, err := i.resolve(addr); err != nil {
			problem = err.Error()
		}
		if i.backends.news(addr, problem) && problem != "" {
			i.log.Warn("backend out of reach", "backend", addr, "error", problem)
		}
	}
	if err := i.hops.refresh(i.linkNow); err != nil {
		i.log.Error("follow routes", "error", err)
	}
	if i.neighbours != nil {
		for _, via := range i.hops.neighbours() {
			i.neighbours.watch(via)
		}
	}
}

// linkNow is askLink without errors: what cannot be asked about is not sent by.
func (i *Instance) linkNow(ifindex int) linkInfo {
	known, err := i.askLink(ifindex)
	if err != nil && !isGone(err) {
		i.log.Error("follow interfaces", "error", err)
	}
	return known
}

// resyncInterfaces forgets programs on interfaces that are gone, attaches again where
// a client-facing one came back, and sets the listeners' addresses.
func (i *Instance) resyncInterfaces() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil
	}
	errs := []error{i.forgetDead()}
	if i.serving {
		errs = append(errs, i.reattach())
	}
	return errors.Join(append(errs, i.applyListeners())...)
}

// forgetDead forgets programs on interfaces that are gone, but keeps them loaded. i.mu is
// held.
func (i *Instance) forgetDead() error {
	var errs []error
	for _, a := range i.sorted() {
		if a.hook.alive() {
			continue
		}
		i.log.Warn("the program is gone from its interface", "interface", a.iface, "role", a.role)
		i.backends.lost(a.ifindex)
		errs = append(errs, i.keepLoaded(a), i.detach(a))
	}
	return errors.Join(errs...)
}

// reattach brings the programs back to interfaces that exist: those that face clients,
// and those that had a program before they went. i.mu is held.
func (i *Instance) reattach() error {
	errs := []error{i.reattachTowards()}
	for _, name := range i.opts.names() {
		device, err := clientDevice(i.ns, name)
		if err != nil {
			continue // still away: its coming back is a change too
		}
		for _, role := range i.roles(name) {
			a, err := i.attach(device, role)
			if a != nil {
				i.log.Info("attached again", "interface", name, "role", role)
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
