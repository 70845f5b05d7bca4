// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	enc "encoding/binary"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	snilbmaps "snilb/maps"
)

// resources is what an instance holds, by name.
type resources map[string]int64

// A bound says what a resource may be in the end, when it was so much in the beginning.
type bound struct {
	name  string
	most  func(before int64) int64
	held  bool // also looked at under load
	exact bool // nor may it be less
}

// The daemon's memory. Go's heap may be twice what lives in it before it is collected, so 50 % more says nothing; stacks and
// memory of the peak go back late.
func memoryBound(kB int64) int64 { return kB + kB/2 + 16<<10 }

func plus(more int64) func(int64) int64 { return func(n int64) int64 { return n + more } }

// The first daemon has not met all neighbours: of managed ones there are more when routes have led everywhere. Of paths there are
// as many as three backends of two families have by two ways; of next hops twice as many, as each way may have been a narrow one
// at a time, and those of clients of two families by two uplinks.
var bounds = []bound{
	{"flows4", plus(0), false, true}, {"flows6", plus(0), false, true}, {"owned", plus(0), false, true},
	{"listeners", plus(0), false, true}, {"listener_ports", plus(0), false, true}, {"paths", func(int64) int64 { return 3 * 2 * 2 }, false, false}, {"nexthops", func(int64) int64 { return 2*3*2*2 + 2*2 }, false, false},
	{"pins", plus(0), false, false}, {"programs", plus(0), false, false}, {"maps", plus(0), false, false}, {"links", plus(0), false, false},
	{"devices", plus(0), false, true}, {"tcx programs", plus(0), false, false}, {"XDP programs", plus(0), false, false}, {"managed neighbours", plus(4), false, false},
	{"files in /run", plus(0), false, false},
	{"bytes in /run", func(int64) int64 { return 4 << 20 }, false, false}, // a journal is made smaller only when it is worth it
	{"descriptors", plus(0), true, false},
	{"goroutines", plus(0), true, false},
	{"threads", plus(8), true, false}, // Go makes one when another is in a system call, and never ends it
	{"resident kB", memoryBound, true, false},
	{"zombies", plus(0), false, false},
}

func resourceNames() (names []string) {
	for _, b := range bounds {
		names = append(names, b.name)
	}
	return names
}

// wrong says what there is more of than the bounds allow, or less where it must be the same.
func (r resources) wrong(last resources, when, then string) (wrong []string) {
	for _, b := range bounds {
		before, now := r[b.name], last[b.name]
		if now > b.most(before) || now < before && b.exact {
			wrong = append(wrong, fmt.Sprintf("%s: %d %s, %d %s", b.name, before, when, now, then))
		}
	}
	return wrong
}

func (r resources) wrongUnderLoad(last resources) (wrong []string) {
	for _, b := range bounds {
		if before, now := r[b.name], last[b.name]; b.held && now > b.most(before) {
			wrong = append(wrong, fmt.Sprintf("%s: %d in the last daemon after its warm-up, %d in the end", b.name, before, now))
		}
	}
	return wrong
}

// settled measures until all is within the bounds, or some time has gone: what is forgotten late is no leak.
func (s *soak) settled(first resources) (last resources) {
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		last = s.measure()
		if len(first.wrong(last, "", "")) == 0 || time.Now().After(deadline) {
			return last
		}
	}
}

// held is the least of some looks at the daemon under load, so that what comes and goes with a request is not in it.
func (s *soak) held() resources {
	least := s.process()
	for range 10 {
		time.Sleep(100 * time.Millisecond)
		for name, n := range s.process() {
			least[name] = min(least[name], n)
		}
	}
	return least
}

// measure is all of it.
func (s *soak) measure() resources {
	s.t.Helper()
	r := s.held()
	dir := s.pinDir()
	for _, name := range []string{"flows4", "flows6", "owned", "listeners", "listener_ports", "paths"} {
		r[name] = entries(s.t, filepath.Join(dir, name), nil)
	}
	// Each time that an interface is made anew costs two entries, one a family: none is given away that a flow may have.
	r["nexthops"] = max(0, entries(s.t, filepath.Join(dir, "nexthops"), s.present())-int64(2*s.replugged))
	s.kernelObjects(dir, r)
	s.devices(r)
	for _, path := range runFiles(s.name) {
		info, err := os.Stat(path)
		if err == nil {
			r["files in /run"]++
			r["bytes in /run"] += info.Size()
		}
	}
	r["zombies"] = zombies(os.Getpid(), s.d.cmd.Process.Pid)
	return r
}

func runFiles(name string) []string {
	files, _ := filepath.Glob(filepath.Join(socketDir, name+"@*"))
	return files
}

func (s *soak) pinDir() string {
	s.t.Helper()
	found, err := filepath.Glob(filepath.Join(pinRoot, s.name+"@*"))
	must(s.t, err)
	if len(found) != 1 {
		s.t.Fatalf("directories of pins: %q", found)
	}
	return found[0]
}

// process is what the daemon's process has.
func (s *soak) process() resources {
	s.t.Helper()
	out, err := s.d.snilb("status", "--name", s.name, "-o", "json")
	must(s.t, err)
	var status struct {
		Goroutines int64 `json:"goroutines"`
	}
	must(s.t, json.Unmarshal([]byte(out), &status))
	proc := fmt.Sprintf("/proc/%d/", s.d.cmd.Process.Pid)
	descriptors, err := os.ReadDir(proc + "fd")
	must(s.t, err)
	return resources{
		"goroutines": status.Goroutines, "descriptors": int64(len(descriptors)),
		"threads": procField(s.t, proc+"status", "Threads:"), "resident kB": procField(s.t, proc+"status", "VmRSS:"),
	}
}

// procField is the number behind a word in a file of /proc.
func procField(t *testing.T, file, word string) int64 {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	_, after, _ := strings.Cut(string(text), "\n"+word)
	n, err := strconv.ParseInt(strings.Fields(after + " ?")[0], 10, 64)
	must(t, err)
	return n
}

// present tells next hops by interfaces that exist: those of one that was deleted stay as long as the daemon, as a flow may have
// them, and it is another one when it comes back.
func (s *soak) present() func(value []byte) bool {
	indexes := make(map[uint32]bool)
	must(s.t, s.bed.LB.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			indexes[uint32(l.Attrs().Index)] = true
		}
		return err
	}))
	return func(value []byte) bool {
		var hop snilbmaps.Nexthop
		_, err := enc.Decode(value, enc.NativeEndian, &hop)
		return err == nil && indexes[hop.Ifindex]
	}
}

// entries counts those of a pinned map that are not all zero, as the entries of an array always exist, and that are counted.
func entries(t *testing.T, path string, counts func(value []byte) bool) (n int64) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	must(t, err)
	defer func() { _ = m.Close() }()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	zero := make([]byte, m.ValueSize())
	it := m.Iterate()
	for it.Next(&key, &value) {
		if (m.Type() != ebpf.Array || !bytes.Equal(value, zero)) && (counts == nil || counts(value)) {
			n++
		}
	}
	must(t, it.Err())
	return n
}

// kernelObjects counts programs, maps and links by what holds them: the daemon's descriptors, the pins, the hooks of the
// interfaces, and programs that hold maps. Those of the whole machine are others' as well.
func (s *soak) kernelObjects(dir string, r resources) {
	ids := map[string]map[string]bool{"prog_id": {}, "map_id": {}, "link_id": {}}
	infos, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", s.d.cmd.Process.Pid))
	for _, path := range infos {
		text, _ := os.ReadFile(path) // it may be closed by now
		collectIDs(ids, string(text))
	}
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			r["pins"]++
			s.pinIDs(ids, path)
		}
		return nil
	})
	must(s.t, s.bed.LB.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			programsOf(l, ids["prog_id"], r)
		}
		return err
	}))
	for id := range maps.Clone(ids["prog_id"]) {
		mapsOfProgram(ids, id)
	}
	r["programs"], r["maps"], r["links"] = int64(len(ids["prog_id"])), int64(len(ids["map_id"])), int64(len(ids["link_id"]))
}

// programsOf counts the programs on an interface of this thread's namespace.
func programsOf(l netlink.Link, ids map[string]bool, r resources) {
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		if res, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: at}); err == nil {
			for _, p := range res.Programs {
				ids[fmt.Sprint(p.ID)] = true
				r["tcx programs"]++
			}
		}
	}
	if x := l.Attrs().Xdp; x != nil && x.Attached {
		ids[fmt.Sprint(x.ProgId)] = true
		r["XDP programs"]++
	}
}

// collectIDs reads a file of /proc/PID/fdinfo.
func collectIDs(ids map[string]map[string]bool, text string) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		if found := ids[name]; found != nil {
			found[strings.TrimSpace(value)] = true
		}
	}
}

// pinIDs opens a pin, which is a link or a map, to read the same of this process.
func (s *soak) pinIDs(ids map[string]map[string]bool, path string) {
	if l, err := link.LoadPinnedLink(path, &ebpf.LoadPinOptions{}); err == nil {
		defer func() { _ = l.Close() }()
		if info, err := l.Info(); err == nil {
			ids["link_id"][fmt.Sprint(info.ID)] = true
			ids["prog_id"][fmt.Sprint(info.Program)] = true
		}
		return
	}
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		s.t.Errorf("the pin %s is neither a link nor a map: %v", path, err)
		return
	}
	defer func() { _ = m.Close() }()
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", m.FD()))
	must(s.t, err)
	collectIDs(ids, string(text))
}

func mapsOfProgram(ids map[string]map[string]bool, id string) {
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return
	}
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(n))
	if err != nil {
		return // it has gone meanwhile
	}
	defer func() { _ = p.Close() }()
	info, err := p.Info()
	if err != nil {
		return
	}
	all, _ := info.MapIDs()
	for _, m := range all {
		ids["map_id"][fmt.Sprint(m)] = true
	}
}

// devices counts those of the balancer's namespace, and what an instance may leave on them.
func (s *soak) devices(r resources) {
	must(s.t, s.bed.LB.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			r["devices"]++
			neighs, _ := netlink.NeighList(l.Attrs().Index, 0)
			for _, n := range neighs {
				if n.FlagsExt&netlink.NTF_EXT_MANAGED != 0 {
					r["managed neighbours"]++
				}
			}
		}
		return err
	}))
}

// zombies counts dead children of processes.
func zombies(parents ...int) (n int64) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(fields) < 2 || fields[0] != "Z" {
			continue
		}
		if parent, err := strconv.Atoi(fields[1]); err == nil && slices.Contains(parents, parent) {
			n++
		}
	}
	return n
}
