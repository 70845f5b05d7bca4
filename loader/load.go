// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"

	"snilb/maps"
)

// Instance is one set of tables with the programs that use them. It is safe for
// concurrent use.
type Instance struct {
	// Set by Load, only read afterwards.
	opts        Options
	log         *slog.Logger
	ns          *namespace
	lock        *lockFile
	dir         string // of the pins
	tables      *maps.Tables
	shared      map[string]*ebpf.Map // tables and the programs' working memory, by name
	rings       []*ebpf.Map          // each worker's, and its quiet one
	jobsProgram *ebpf.Program
	jobs        []*maps.Jobs
	tap         *tap
	hasCsumIPv6 bool
	state       *adopted // what an earlier daemon left, nil if nothing

	subscribe func(*namespace) (changes, error) // a seam: tests break the subscription

	hops       *hopTable
	neighbours *neighbourTable // nil without XDP
	cache      routeCache
	backends   backendSet
	sockets    socketWatch

	stop context.CancelFunc // of every Run
	ctx  context.Context    // done when stop was called
	runs sync.WaitGroup

	mu sync.Mutex // guards the rest
	// attached holds the reference to every link: a link that is collected as garbage takes its program off.
	attached  map[attachKey]*attachment
	record    maps.InstanceRecord
	gone      []goneProgram
	serving   bool // Attach was called: interfaces that come back are attached again
	mine      bool // Close may remove the state: we made it, or took it over to the end
	closed    bool
	noTCX     bool
	listeners listenerSet
}

// Load makes the maps, the pins and the TAP device of an instance, or takes over those
// that an earlier daemon of that name left: its connections go on. No packet is touched
// before Attach but by programs that are attached already. Returns an error that is
// ErrRunning if a living daemon has the name, one that is ErrLayout for state that this
// version cannot go on with, and Problems that say how this machine has to change.
func Load(o Options) (_ *Instance, err error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	i := &Instance{
		opts:      o,
		log:       o.Logger,
		subscribe: subscribe,
		tables:    &maps.Tables{},
		shared:    make(map[string]*ebpf.Map),
		backends:  newBackendSet(),
		attached:  make(map[attachKey]*attachment),
		noTCX:     o.forceClsact,
	}
	if i.ns, err = currentNamespace(); err != nil {
		return nil, err
	}
	i.ctx, i.stop = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, i.Close())
		}
	}()
	problems := preflight(i.ns, &i.opts)
	if err := fatal(problems); err != nil {
		return nil, err
	}
	for _, p := range problems {
		i.log.Warn(p.What, "remedy", p.Remedy)
	}
	if err := i.claim(); err != nil {
		return nil, err
	}
	return i, i.build()
}

// claim takes the name, and the interfaces as far as other instances go.
func (i *Instance) claim() (err error) {
	if err := i.opts.before("lock"); err != nil {
		return err
	}
	if i.lock, err = acquire(i.ns, i.opts.Name); err != nil {
		return err
	}
	if err := mountBPFFS(i.log); err != nil {
		return err
	}
	i.dir = filepath.Join(stateDir, i.opts.Name+i.ns.suffix)
	if err := i.announce(); err != nil {
		return err
	}
	if err := i.opts.before("state"); err != nil {
		return err
	}
	if i.state, err = i.openState(); err != nil {
		return err
	}
	if i.state != nil {
		// Its connections have ports too, by which ours have become more.
		if err := i.announce(); err != nil {
			return err
		}
		i.log.Info("going on with what an earlier daemon left", "instance", i.opts.Name, "silent_for", i.state.silence())
		return nil
	}
	found, err := removeLeftovers(i.ns, i.opts.Name, i.log)
	if found {
		i.log.Warn("removed what a daemon left that died while it began or ended", "instance", i.opts.Name)
	}
	return err
}

// announce has the lock say what we take, and then looks whether another instance has it: two
// daemons that start at once see each other's locks.
func (i *Instance) announce() error {
	if err := i.lock.write(owner{pid: os.Getpid(), interfaces: i.opts.names(), ports: i.SourcePorts()}); err != nil {
		return err
	}
	return i.refuseTaken()
}

// refuseTaken looks whether another instance has one of our interfaces, or source ports:
// what comes back from a backend that both have would be the other's.
func (i *Instance) refuseTaken() error {
	locked, err := instancesIn(runDir, i.ns.suffix, ".lock")
	if err != nil {
		return err
	}
	left, err := instancesIn(stateDir, i.ns.suffix, "")
	if err != nil {
		return err
	}
	all := append(locked, left...)
	slices.Sort(all)
	for _, other := range slices.Compact(all) {
		if other == i.opts.Name {
			continue
		}
		if err := i.refuseShared(other, slices.Contains(left, other)); err != nil {
			return err
		}
	}
	return i.refuseHeld()
}

// refuseShared is refuseTaken for one other instance.
func (i *Instance) refuseShared(other string, hasState bool) error {
	path := lockPath(i.ns, other)
	has, held := readOwner(path), isHeld(path)
	if held {
		for _, name := range i.opts.names() {
			if slices.Contains(has.interfaces, name) {
				return fmt.Errorf("interface %s belongs to instance %s (pid %d); stop that one first, or name the interface there only", name, other, has.pid)
			}
		}
	}
	if !held && !hasState {
		return nil // it has left nothing
	}
	// The lock is gone with a daemon that has left its state, and tells of one that begins what the state does not yet.
	ranges := [][2]uint16{has.ports}
	// State of another version may not tell its ports.
	if record, err := readRecord(filepath.Join(stateDir, other+i.ns.suffix)); err == nil {
		ranges = append(ranges, [2]uint16{record.SourcePortFirst, record.SourcePortLast})
	}
	for _, ports := range ranges {
		switch {
		case !i.opts.overlaps(ports):
		case held:
			return fmt.Errorf("the source ports %d-%d overlap with those of instance %s (%d-%d, pid %d); give the pools of one of them a range of their own: source: {ports: \"5000-9999\"}",
				i.opts.SourcePortFirst, i.opts.SourcePortLast, other, ports[0], ports[1], has.pid)
		default:
			return fmt.Errorf("instance %s, whose daemon is dead, still has connections from the source ports %d-%d; start it again, remove it (snilb detach --all --name %s), or give the pools here a range of their own: source: {ports: \"5000-9999\"}",
				other, ports[0], ports[1], other)
		}
	}
	return nil
}

// refuseHeld looks for programs of other instances on our interfaces.
func (i *Instance) refuseHeld() error {
	for _, name := range i.opts.names() {
		other, err := holder(i.ns, name)
		if isGone(err) {
			continue // nobody has what is not there
		}
		if err != nil {
			return err
		}
		if other != "" && other != i.opts.Name {
			return fmt.Errorf("interface %s still has the program of instance %s; remove it first: snilb detach --all --name %s", name, other, other)
		}
	}
	return nil
}

// build makes everything that does not touch packets.
func (i *Instance) build() (err error) {
	if i.hasCsumIPv6, err = probeCsumIPv6(); err != nil {
		return err
	}
	steps := []struct {
		name string
		do   func() error
	}{
		{"record", i.newRecord},
		{"maps", i.createMaps},
		{"rings", i.createRings},
		{"jobs", i.createJobs},
		{"pin", i.pinMaps},
		{"tap", i.createTap},
		{"hops", i.createHops},
	}
	for _, step := range steps {
		if err := i.opts.before(step.name); err != nil {
			return err
		}
		if err := step.do(); err != nil {
			return err
		}
	}
	return nil
}

func (i *Instance) createHops() error {
	i.hops = newHopTable(
		func(index uint32, hop *maps.Nexthop) error { return i.tables.Nexthops.Put(&index, hop) },
		func(dst netip.Addr) (route, error) { return lookupRoute(i.ns, dst) },
	)
	if i.opts.usesXDP() {
		i.hops.own.log, i.hops.own.everybody = i.log, true
		i.neighbours = newNeighbourTable(i.ns, i.dir, i.hops.setNeighbour, i.log)
	}
	if i.state == nil {
		return nil
	}
	return i.adoptHops()
}

// pinMaps builds the state directory under another name and moves it into place
// complete: whoever finds it finds all of it.
func (i *Instance) pinMaps() error {
	if i.state != nil {
		return nil
	}
	if err := i.writeRecord(); err != nil {
		return err
	}
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	building := i.dir + unfinished
	for _, dir := range []string{building, filepath.Join(building, "links"), filepath.Join(building, "clsact"),
		filepath.Join(building, ringPins), filepath.Join(building, neighbourMarks)} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return fmt.Errorf("make the state directory: %w", err)
		}
	}
	for _, m := range i.tables.All() {
		if err := pinMap(m.Map, filepath.Join(building, m.Name)); err != nil {
			return err
		}
	}
	for n, ring := range i.rings {
		if err := pinMap(ring, filepath.Join(building, ringPins, ringPin(n))); err != nil {
			return err
		}
	}
	if err := os.Rename(building, i.dir); err != nil {
		return fmt.Errorf("move the state directory into place: %w", err)
	}
	i.mine = true
	return nil
}

// pinMap pins a clone, because the library would remember a path that is about to change.
func pinMap(m *ebpf.Map, path string) error {
	pin, err := m.Clone()
	if err == nil {
		err = errors.Join(pin.Pin(path), pin.Close())
	}
	if err != nil {
		return fmt.Errorf("pin map %s: %w", filepath.Base(path), err)
	}
	return nil
}

// pinAnew puts maps that could not be taken over in the place of the old ones.
func (i *Instance) pinAnew() error {
	for _, m := range i.tables.All() {
		if i.state.maps[m.Name] != nil {
			continue
		}
		path := filepath.Join(i.dir, m.Name)
		if err := removeFile(path + unfinished); err != nil {
			return err
		}
		if err := pinMap(m.Map, path+unfinished); err != nil {
			return err
		}
		if err := os.Rename(path+unfinished, path); err != nil {
			return fmt.Errorf("pin map %s: %w", m.Name, err)
		}
	}
	return nil
}

// Close takes everything out of the kernel that Load and Attach put there, and ends
// Run. It goes on after an error and returns all of them; a second call does
// nothing. Whoever uses the tables, rings and queues has to stop before. What Load took
// over and Attach did not come to is left as it is.
func (i *Instance) Close() error { return i.end(false) }

// Leave is Close for a daemon that another one follows: all stays in the kernel, and
// connections go on, if Attach has succeeded.
func (i *Instance) Leave() error { return i.end(true) }

func (i *Instance) end(leave bool) error {
	i.mu.Lock()
	again := i.closed
	i.closed = true // from here on nothing is attached any more
	i.mu.Unlock()
	if again {
		return nil
	}
	i.stop()
	i.runs.Wait()

	i.mu.Lock()
	defer i.mu.Unlock()
	stay := leave && i.serving
	errs := []error{i.detachAll(stay), i.dropGone(len(i.gone))}
	if i.neighbours != nil && !stay {
		errs = append(errs, i.neighbours.close())
	}
	if i.tap != nil {
		errs = append(errs, i.tap.close(i.ns, stay || i.tap.adopted && !i.mine))
	}
	for _, jobs := range i.jobs {
		errs = append(errs, jobs.Close())
	}
	if i.jobsProgram != nil {
		errs = append(errs, i.jobsProgram.Close())
	}
	for _, ring := range i.rings {
		errs = append(errs, ring.Close())
	}
	for _, m := range i.shared {
		errs = append(errs, m.Close())
	}
	if i.state != nil {
		errs = append(errs, i.state.close())
	}
	if i.lock != nil {
		if i.mine && !stay {
			errs = append(errs, releaseMarked(i.ns, i.dir), removeDir(i.dir), removeJournal(i.ns, i.opts.Name)) // marks of an earlier daemon too
		}
		errs = append(errs, removeUnfinished(i.dir), removeEmpty(stateDir), i.lock.release())
	}
	return errors.Join(append(errs, i.ns.close())...)
}

// detachAll takes XDP off first, behind which all is complete, and then the client
// programs: no connection begins any more while the rest still is. If all shall stay, it
// is only forgotten here.
func (i *Instance) detachAll(stay bool) error {
	order := []Role{RoleXDP, RoleClient, RoleBackend, RoleTap}
	all := i.sorted()
	slices.SortStableFunc(all, func(a, b *attachment) int {
		return slices.Index(order, a.role) - slices.Index(order, b.role)
	})
	var errs []error
	for _, a := range all {
		if stay {
			errs = append(errs, i.release(a))
		} else {
			errs = append(errs, i.undo(a))
		}
	}
	return errors.Join(errs...)
}

// sorted lists the attachments in a fixed order: by interface, then role.
func (i *Instance) sorted() []*attachment {
	var all []*attachment
	for _, a := range i.attached {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b *attachment) int {
		if a.ifindex != b.ifindex {
			return a.ifindex - b.ifindex
		}
		return strings.Compare(string(b.role), string(a.role)) // xdp before client before backend, as a packet meets them
	})
	return all
}

// Tables returns the maps of the instance. They are closed by Close.
func (i *Instance) Tables() *maps.Tables { return i.tables }

// Ring returns the ring buffer of a worker. It is closed by Close.
func (i *Instance) Ring(worker int) *ebpf.Map { return i.rings[2*worker] }

// Jobs is what a worker has the kernel do its work on flows by.
func (i *Instance) Jobs(worker int) *maps.Jobs { return i.jobs[worker] }

// QuietRing is the ring of a worker whose events wake nobody.
func (i *Instance) QuietRing(worker int) *ebpf.Map { return i.rings[2*worker+1] }

// TapQueues returns one file a worker: each Write puts a whole Ethernet frame on
// the TAP device, where the TAP program runs on it before Write returns. The files
// are blocking and closed by Close.
func (i *Instance) TapQueues() []*os.File { return i.tap.queues }

// TapName returns the name of the TAP device.
func (i *Instance) TapName() string { return i.tap.name }

// Directory returns where the maps and links are pinned.
func (i *Instance) Directory() string { return i.dir }

// Socket returns where the daemon of this instance listens for commands.
func (i *Instance) Socket() string {
	return filepath.Join(runDir, i.opts.Name+i.ns.suffix+".sock")
}

// Journal returns where the engine may note what the next daemon shall know of flows. It
// goes with the state.
func (i *Instance) Journal() string { return journalIn(i.ns, i.opts.Name) }

// MTU returns the MSS to announce to clients, by address family: what the smallest
// MTU on the way to a backend holds, as all that a client sends goes there.
func (i *Instance) MTU() (mss4, mss6 uint16) {
	mtu4, mtu6 := i.backends.smallestMTU()
	if client := i.clientMTU(); client > 0 {
		mtu4, mtu6 = min(mtu4, client), min(mtu6, client)
	}
	const (
		headers4, headers6 = 20 + 20, 40 + 20
		least4, least6     = 536, 1220 // RFC 1122, RFC 8200
	)
	return uint16(min(max(mtu4-headers4, least4), 65535-headers4)), uint16(min(max(mtu6-headers6, least6), 65535-headers6))
}

// clientMTU is the smallest of the client-facing interfaces, or 0: a larger MSS
// than the link towards the client holds would rely on path MTU discovery.
func (i *Instance) clientMTU() int {
	smallest := 0
	for _, name := range i.opts.names() {
		device, err := i.ns.LinkByName(name)
		if err != nil {
			continue // it is away just now, and with it its clients
		}
		if mtu := device.Attrs().MTU; smallest == 0 || mtu < smallest {
			smallest = mtu
		}
	}
	return smallest
}

// family4 reports whether an address is IPv4.
func family4(addr netip.Addr) bool { return addr.Is4() || addr.Is4In6() }
