// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what a reader needs to know of where the figures come from.
type machine struct {
	CPU          string    `json:"cpu"`
	CPUs         int       `json:"cpus"`
	Virtual      bool      `json:"virtual"`
	MemoryBytes  int64     `json:"memory_bytes"`
	Kernel       string    `json:"kernel"`
	Date         time.Time `json:"date"`
	ConntrackMax int64     `json:"nf_conntrack_max,omitempty"`
	// IdleBusy is the share of all CPUs that was at work before the benchmark began: the noise.
	IdleBusy float64 `json:"idle_busy"`
}

func thisMachine() (machine, error) {
	m := machine{CPUs: runtime.NumCPU(), Date: time.Now().UTC().Truncate(time.Second)}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(info)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			m.CPU = strings.TrimSpace(value)
		case "flags":
			m.Virtual = slices.Contains(strings.Fields(value), "hypervisor")
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	mem, err := readMemory()
	if err != nil {
		return m, err
	}
	m.MemoryBytes = mem.Fields["MemTotal"]
	if text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max"); err == nil {
		m.ConntrackMax, _ = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	}
	return m, nil
}

// noise is the share of all CPUs at work during the time.
func noise(ctx context.Context, wait time.Duration) (float64, error) {
	s := startSampler()
	began := time.Now()
	select {
	case <-ctx.Done():
	case <-time.After(wait):
	}
	took := time.Since(began)
	if err := s.stop(); err != nil {
		return 0, err
	}
	return s.between(began, began.Add(took)) / took.Seconds() / float64(runtime.NumCPU()), ctx.Err()
}

// sampler notes all along how long the machine was at work, so that the CPU of a measurement can be told from that of its
// warm-up, which is known only afterwards.
type sampler struct {
	samples []sample
	err     error
	done    chan struct{}
	running sync.WaitGroup
}

// sample is the work of all CPUs together until then, in seconds.
type sample struct {
	at   time.Time
	busy float64
}

const samplePeriod = 20 * time.Millisecond

func startSampler() *sampler {
	s := &sampler{done: make(chan struct{})}
	s.take()
	s.running.Go(func() {
		tick := time.NewTicker(samplePeriod)
		defer tick.Stop()
		for {
			select {
			case <-s.done:
				s.take()
				return
			case <-tick.C:
				s.take()
			}
		}
	})
	return s
}

func (s *sampler) take() {
	idle, err := idleSeconds()
	if err != nil {
		s.err = err
		return
	}
	at := time.Now()
	// The zero of the scale is anywhere: only differences are used.
	s.samples = append(s.samples, sample{at, float64(at.UnixMicro())/1e6*float64(runtime.NumCPU()) - idle})
}

func (s *sampler) stop() error {
	close(s.done)
	s.running.Wait()
	return s.err
}

// between is the CPU time of all CPUs from one moment to another.
func (s *sampler) between(from, to time.Time) float64 { return s.until(to) - s.until(from) }

// until is the work until a moment, in a straight line between the samples.
func (s *sampler) until(at time.Time) float64 {
	i, found := slices.BinarySearchFunc(s.samples, at, func(x sample, t time.Time) int { return x.at.Compare(t) })
	switch {
	case found:
		return s.samples[i].busy
	case i == 0:
		return s.samples[0].busy
	case i == len(s.samples):
		return s.samples[i-1].busy
	}
	a, b := s.samples[i-1], s.samples[i]
	share := float64(at.Sub(a.at)) / float64(b.at.Sub(a.at))
	return a.busy + share*(b.busy-a.busy)
}

// idleSeconds is how long all CPUs together had nothing to do. What is not idle was work, soft interrupts and time stolen
// by a hypervisor included. The other columns of the line are not added up instead: they are counted by the timer's tick,
// which misses what runs between two, and an idle CPU has no tick at all.
func idleSeconds() (float64, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	fields := strings.Fields(line)
	if len(fields) < 6 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	idle, err1 := strconv.ParseInt(fields[4], 10, 64)
	wait, err2 := strconv.ParseInt(fields[5], 10, 64)
	return float64(idle+wait) / 100, errors.Join(err1, err2)
}

// memory is what the kernel holds, in bytes.
type memory struct {
	// Fields are the lines of /proc/meminfo that matter here.
	Fields map[string]int64 `json:"meminfo"`
	// TCP is the memory of socket buffers, of all namespaces.
	TCP int64 `json:"tcp_buffers"`
	// Slabs is what slab caches hold, but for those of processes and files, which change with what else happens on the
	// machine. Where the kernel has no /proc/slabinfo, it is all slabs.
	Slabs int64 `json:"slabs"`
	// Caches are the slab caches, where the kernel has /proc/slabinfo.
	Caches map[string]int64 `json:"caches,omitempty"`
	// Daemon is the resident memory of the contender's processes, where shared pages count once.
	Daemon int64 `json:"daemon"`
}

var meminfoFields = []string{"MemTotal", "Slab", "SUnreclaim", "KernelStack", "PageTables", "VmallocUsed", "Percpu"}

// elsewhere are slab caches of processes and of files, not of sockets, packets and tables.
var elsewhere = []string{
	"anon_vma", "anon_vma_chain", "vm_area_struct", "vma_lock", "maple_node", "mm_struct", "task_struct", "signal_cache",
	"sighand_cache", "files_cache", "fs_cache", "cred_jar", "pid", "proc_inode_cache", "inode_cache", "shmem_inode_cache",
	"ext4_inode_cache", "xfs_inode", "btrfs_inode", "ovl_inode", "kernfs_node_cache", "radix_tree_node", "buffer_head",
}

// kernel is what the kernel has allocated for itself, and what sockets hold.
func (m memory) kernel() int64 {
	return m.Slabs + m.TCP + m.Fields["VmallocUsed"] + m.Fields["Percpu"]
}

// taken is what connections made the kernel allocate since before. None of them makes a slab cache smaller: where one is,
// somebody else has freed something, and it does not count.
func (m memory) taken(before memory) int64 {
	bytes := m.TCP - before.TCP
	if m.Caches == nil {
		return bytes + m.Slabs - before.Slabs
	}
	for name, now := range m.Caches {
		if !slices.Contains(elsewhere, name) {
			bytes += max(0, now-before.Caches[name])
		}
	}
	return bytes
}

func readMemory() (m memory, err error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return m, err
	}
	if m.Fields, err = parseMeminfo(string(text)); err != nil {
		return m, err
	}
	if text, err = os.ReadFile("/proc/net/sockstat"); err != nil {
		return m, err
	}
	m.TCP = sockstatPages(string(text)) * int64(os.Getpagesize())
	text, err = os.ReadFile("/proc/slabinfo")
	if errors.Is(err, fs.ErrNotExist) {
		m.Slabs = m.Fields["Slab"]
		return m, nil
	}
	m.Caches = parseSlabinfo(string(text))
	for name, bytes := range m.Caches {
		if !slices.Contains(elsewhere, name) {
			m.Slabs += bytes
		}
	}
	return m, err
}

func parseMeminfo(text string) (map[string]int64, error) {
	out := map[string]int64{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		if !slices.Contains(meminfoFields, key) {
			continue
		}
		kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("/proc/meminfo: %q: %w", line, err)
		}
		out[key] = kb << 10
	}
	return out, nil
}

// sockstatPages reads the pages of "TCP: ... mem N".
func sockstatPages(text string) int64 {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if i := slices.Index(fields, "mem"); len(fields) > 0 && fields[0] == "TCP:" && i >= 0 && i+1 < len(fields) {
			n, _ := strconv.ParseInt(fields[i+1], 10, 64)
			return n
		}
	}
	return 0
}

// parseSlabinfo returns the bytes of every cache: objects in use times what one takes of its slab. Slabs themselves are not
// counted, because the kernel keeps some that are empty.
func parseSlabinfo(text string) map[string]int64 {
	out := map[string]int64{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 16 || strings.HasPrefix(line, "#") {
			continue
		}
		used, err1 := strconv.ParseInt(f[1], 10, 64)
		slab, err2 := strconv.ParseInt(f[4], 10, 64)
		pages, err3 := strconv.ParseInt(f[5], 10, 64)
		if errors.Join(err1, err2, err3) == nil && slab > 0 {
			out[f[0]] += used * pages * int64(os.Getpagesize()) / slab
		}
	}
	return out
}

// grown returns the caches that have grown most, by bytes.
func grown(before, after map[string]int64, count int) map[string]int64 {
	type cache struct {
		name  string
		bytes int64
	}
	var all []cache
	for name, bytes := range after {
		all = append(all, cache{name, bytes - before[name]})
	}
	slices.SortFunc(all, func(a, b cache) int { return cmp.Or(cmp.Compare(b.bytes, a.bytes), cmp.Compare(a.name, b.name)) })
	out := map[string]int64{}
	for _, c := range all[:min(count, len(all))] {
		if c.bytes > 0 {
			out[c.name] = c.bytes
		}
	}
	return out
}

// resident is the memory of a process group.
func resident(group int) (bytes int64) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pgid, err := unix.Getpgid(pid); err == nil && pgid == group {
			bytes += residentOne(pid)
		}
	}
	return bytes
}

// residentOne is the memory of a process: of every page its share, so that what nginx's workers share counts once. Nothing
// when it has ended.
func residentOne(pid int) (bytes int64) {
	rollup, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(rollup)) {
		if value, ok := strings.CutPrefix(line, "Pss:"); ok {
			kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			bytes += kb << 10
		}
	}
	return bytes
}
