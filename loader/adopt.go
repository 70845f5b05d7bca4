// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	bpf "snilb/maps"
)

// ErrLayout says that an instance's state is not of this version's layout.
var ErrLayout = errors.New("the state of this instance cannot be taken over")

// adopted is what an earlier daemon of the instance left pinned.
type adopted struct {
	maps map[string]*ebpf.Map // by name, those that this version can go on with; closed once they are in the tables
}

// mayBeAnew lists the maps that may be replaced if their layout changed: what is in them is not missed by any connection.
var mayBeAnew = []string{bpf.MapCounters}

// openState opens what an earlier daemon left, nil if there is nothing. The options become those that its maps were made
// for. Returns an error that is ErrLayout for what this version cannot go on with; it is left as it is.
func (i *Instance) openState() (*adopted, error) {
	if _, err := os.Stat(i.dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("look for the state of instance %s: %w", i.opts.Name, err)
	}
	record, err := readRecord(i.dir)
	if err != nil {
		return nil, i.layoutError(err)
	}
	wanted := i.SourcePorts()
	if err := i.opts.keep(record); err != nil {
		return nil, err
	}
	if err := i.checkMerged(wanted, record); err != nil {
		return nil, err
	}
	i.record = *record
	spec, err := i.spec(place{role: RoleTap})
	if err != nil {
		return nil, err
	}
	a := &adopted{maps: make(map[string]*ebpf.Map)}
	for _, m := range i.tables.All() {
		opened, err := openPin(filepath.Join(i.dir, m.Name), spec.Maps[m.Name])
		if err == nil {
			a.maps[m.Name] = opened
			continue
		}
		if !slices.Contains(mayBeAnew, m.Name) {
			return nil, errors.Join(i.layoutError(err), a.close())
		}
		i.log.Warn("counters begin at zero: they are of another version", "map", m.Name, "error", err)
	}
	i.keepFlowEntries(int(a.maps[mapFlows4].MaxEntries()))
	return a, nil
}

func (i *Instance) layoutError(err error) error {
	return fmt.Errorf("instance %s: %w: %w; its connections go on as they are: start the version that made it, or end them by snilb detach --all --name %s and start again",
		i.opts.Name, ErrLayout, err, i.opts.Name)
}

// readRecord reads the record of the instance whose pins are in dir. Of another layout only the first word is looked at.
func readRecord(dir string) (*bpf.InstanceRecord, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, bpf.MapInstance), nil)
	if err != nil {
		return nil, fmt.Errorf("open its record: %w", err)
	}
	defer m.Close() //nolint:errcheck // only read
	record, err := bpf.ReadRecord(m)
	if err != nil {
		return nil, err
	}
	if record.Layout != bpf.LayoutVersion {
		return nil, fmt.Errorf("it is of layout %d, this version has %d", record.Layout, bpf.LayoutVersion)
	}
	return record, nil
}

// openPin opens a pinned map that must be like spec; sizes that the options set are taken as they are.
func openPin(path string, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned map: %w", err)
	}
	want := spec.Copy()
	want.MaxEntries = m.MaxEntries()
	if err := want.Compatible(m); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (a *adopted) close() error {
	var errs []error
	for _, m := range a.maps {
		errs = append(errs, m.Close()) // a second time does nothing
	}
	return errors.Join(errs...)
}

// keep makes the options those by which an instance's maps were made, as far as flows depend on them.
func (o *Options) keep(r *bpf.InstanceRecord) error {
	if int(r.Workers) != o.Workers {
		o.Logger.Warn("the number of workers stays as the connections have it, until the instance is detached", "workers", r.Workers, "wanted", o.Workers)
	}
	o.Workers, o.RingSize = int(r.Workers), int(r.RingSize)
	first, last, err := mergePorts(r, o.SourcePortFirst, o.SourcePortLast)
	if err != nil {
		return err
	}
	o.SourcePortFirst, o.SourcePortLast = first, last
	return o.validate()
}

// mergePorts widens the record's range of source ports so that it holds first to last too. Which worker has a port is
// counted from the range's beginning, which may so only move by the number of workers.
func mergePorts(r *bpf.InstanceRecord, first, last uint16) (uint16, uint16, error) {
	begin, workers := int(r.SourcePortFirst), int(r.Workers)
	if begin > int(first) {
		begin -= (begin - int(first) + workers - 1) / workers * workers
	}
	if begin < 1 {
		return 0, 0, fmt.Errorf("source ports from %d cannot be added to those that connections have, from %d: begin at %d or above, or detach the instance first",
			first, r.SourcePortFirst, int(r.SourcePortFirst)%workers+workers)
	}
	return uint16(begin), max(last, r.SourcePortLast), nil
}

// checkMerged is preflight's check of the source ports once more where a record made them others than the wanted ones.
func (i *Instance) checkMerged(wanted [2]uint16, r *bpf.InstanceRecord) error {
	if i.SourcePorts() == wanted {
		return nil
	}
	problems := checkPorts(i.ns, i.opts.SourcePortFirst, i.opts.SourcePortLast)
	if err := fatal(problems); err != nil {
		return fmt.Errorf("source ports %d-%d cannot be added to those that connections have, %d-%d: %w; or ask for some within or next to the old ones, or detach the instance first: snilb detach --all --name %s",
			wanted[0], wanted[1], r.SourcePortFirst, r.SourcePortLast, err, i.opts.Name)
	}
	for _, p := range problems {
		i.log.Warn(p.What, "remedy", p.Remedy)
	}
	return nil
}

// silence is how long the daemon has given no sign of life that left the tables.
func (a *adopted) silence() time.Duration {
	live, err := (&bpf.Tables{Control: a.maps[bpf.MapControl]}).Live()
	if err != nil {
		return 0
	}
	return max(0, silence(&live)).Round(time.Millisecond)
}

// keepFlowEntries notes how many entries the tables have; each flow has two.
func (i *Instance) keepFlowEntries(entries int) {
	if most := entries / 2; most != i.opts.FlowEntries {
		i.log.Warn("the size of the flow tables stays as it is, until the instance is detached", "flows", most, "wanted", i.opts.FlowEntries)
		i.opts.FlowEntries = most
	}
}

// newRecord is that of an instance that begins.
func (i *Instance) newRecord() (err error) {
	if i.state != nil {
		return nil
	}
	i.record = bpf.InstanceRecord{
		Layout: bpf.LayoutVersion, Workers: uint32(i.opts.Workers), RingSize: uint32(i.opts.RingSize),
	}
	if _, err = rand.Read(i.record.Secret[:]); err != nil {
		return fmt.Errorf("draw a secret: %w", err)
	}
	i.record.WorkerKey = mathrand.Uint64()
	return nil
}

// writeRecord brings the record up to date with the options and slots.
func (i *Instance) writeRecord() error {
	i.record.SourcePortFirst, i.record.SourcePortLast = i.opts.SourcePortFirst, i.opts.SourcePortLast
	zero := uint32(0)
	if err := i.tables.Instance.Put(&zero, &i.record); err != nil {
		return fmt.Errorf("write the instance's record: %w", err)
	}
	return nil
}

// Secret is what the instance's daemons of all times have in common and nobody else knows.
func (i *Instance) Secret() [32]byte { return i.record.Secret }

// SourcePorts is the range that the kernel programs know, first and last: at least the one asked for.
func (i *Instance) SourcePorts() [2]uint16 {
	return [2]uint16{i.opts.SourcePortFirst, i.opts.SourcePortLast}
}

// Adopted reports whether there was state to go on with.
func (i *Instance) Adopted() bool { return i.state != nil }

// adoptHops takes over the next hops that flows have. Those that none has are free again.
func (i *Instance) adoptHops() error {
	samples := make(map[uint16][]netip.Addr)
	var enough [1 << 16]bool // of a million flows almost all are by a hop that has
	err := i.tables.FlowHops(func(index uint16, dst netip.Addr) {
		if enough[index] || slices.Contains(samples[index], dst) {
			return
		}
		samples[index] = append(samples[index], dst)
		enough[index] = len(samples[index]) >= hopSamples
	})
	if err != nil {
		return err
	}
	written, err := i.tables.UsedNexthops()
	if err != nil {
		return err
	}
	i.hops.adopt(written, samples, i.linkNow)
	return nil
}

// adoptRest takes over what is attached and was not asked for. A backend that is no longer in the configuration may still
// have connections; by an interface that no longer faces clients none shall come in.
func (i *Instance) adoptRest() error {
	left, err := i.leftAttachments()
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range left {
		if l.role == RoleBackend && l.device != nil {
			_, err := i.attach(l.device, l.role)
			errs = append(errs, err)
		}
		if i.isTakenOver(&l) {
			continue
		}
		if l.device != nil { // else it went with its interface
			i.log.Info("taking a program off that is not asked for any more", "interface", l.iface, "role", l.role)
		}
		errs = append(errs, l.remove())
	}
	return errors.Join(errs...)
}

// forgetPaths removes the paths of backends that are gone.
func (i *Instance) forgetPaths() error {
	keys, err := i.tables.PathKeys()
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range keys {
		if !i.backends.has(path.Source, path.Backend) {
			errs = append(errs, i.tables.DeletePath(path.Source, path.Backend))
		}
	}
	return errors.Join(errs...)
}
