// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// FlowJobs is the most jobs of one [Jobs.Run].
const FlowJobs = 64

// Jobs has the kernel insert, read and remove flows, many in one system call, which costs more than the work itself. The
// jobs and their results lie in memory shared with the program. One worker's; not for two goroutines at once.
type Jobs struct {
	prog   *ebpf.Program
	mapped []byte
	jobs   *[FlowJobs]bpfFlowJob
	count  int
	args   bpfFlowJobsArgs
	attr   progRun
}

// Pair is a flow in both directions: the tuples of its packets, and what becomes of them.
type Pair struct {
	Client, Backend Tuple  // as packets of that leg show them
	Up, Down        *Entry // client to backend, and back
}

// progRun is the part of union bpf_attr that BPF_PROG_TEST_RUN reads.
type progRun struct {
	prog, retval                  uint32
	dataSizeIn, dataSizeOut       uint32
	dataIn, dataOut               uint64
	repeat, duration              uint32
	contextSizeIn, contextSizeOut uint32
	contextIn                     unsafe.Pointer
	contextOut                    uint64
	flags, cpu, batch, _          uint32
}

// NewJobs maps a worker's part of the map. prog is [ProgramJobs] loaded, jobs its [MapJobs]; both must live as long.
func NewJobs(prog *ebpf.Program, jobs *ebpf.Map, worker int) (*Jobs, error) {
	stride := (int(jobs.ValueSize()) + 7) &^ 7
	page := os.Getpagesize()
	size := (stride*int(jobs.MaxEntries()) + page - 1) / page * page
	mapped, err := unix.Mmap(jobs.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the flow jobs: %w", err)
	}
	j := &Jobs{prog: prog, mapped: mapped, args: bpfFlowJobsArgs{Worker: uint32(worker)}}
	j.jobs = (*[FlowJobs]bpfFlowJob)(unsafe.Pointer(&mapped[worker*stride]))
	j.attr = progRun{
		prog: uint32(prog.FD()), contextIn: unsafe.Pointer(&j.args), contextSizeIn: uint32(unsafe.Sizeof(j.args)),
	}
	return j, nil
}

// Close unmaps the memory.
func (j *Jobs) Close() error { return unix.Munmap(j.mapped) }

// add makes the next job. There are FlowJobs.
func (j *Jobs) add(op uint16, client, backend Tuple) *flowJob {
	job := &j.jobs[j.count]
	j.count++
	job.Op, job.Family, job.Result = op, unix.AF_INET6, -int32(unix.EINPROGRESS)
	if client.Src.Addr().Is4() {
		job.Family = unix.AF_INET
	}
	job.Client, job.Backend = flow6Key(LegClient, client), flow6Key(LegBackend, backend)
	return (*flowJob)(job)
}

type flowJob bpfFlowJob

// expect says what the client's entry of the job's flow looks like.
func (f *flowJob) expect(generation uint16) {
	f.Up.Flow.Generation = generation
	f.Up.Flow.Sport, f.Up.Flow.Dport = f.Backend.Dport, f.Backend.Sport
	f.Up.Saddr, f.Up.Daddr = f.Backend.Daddr, f.Backend.Saddr
}

// Bind inserts both entries of a flow or none, the backend's in the place of a pending one if there is one. Returns an
// error that is ebpf.ErrKeyExist if a tuple has an entry already, ebpf.ErrKeyNotExist if there is no pending one, and
// unix.E2BIG if the table is full.
func (j *Jobs) Bind(p *Pair, pending bool) error {
	op := bpfFlowJobOpFLOW_JOB_BIND
	if pending {
		op = bpfFlowJobOpFLOW_JOB_REBIND
	}
	job := j.add(uint16(op), p.Client, p.Backend)
	job.Up, job.Down = value6(p.Up), value6(p.Down)
	if err := j.Run(); err != nil {
		return err
	}
	return j.Result(0)
}

// Read adds the job to read a flow, by the tuples of its packets. An entry of the client's with another generation, or
// that leads elsewhere than to this backend, is of another flow.
func (j *Jobs) Read(client, backend Tuple, generation uint16) {
	j.add(uint16(bpfFlowJobOpFLOW_JOB_READ), client, backend).expect(generation)
}

// Remove adds the job to remove a flow: the client's entry if it is of this flow, as Read says, and the backend's. That
// there is none is no error.
func (j *Jobs) Remove(client, backend Tuple, generation uint16) {
	j.add(uint16(bpfFlowJobOpFLOW_JOB_REMOVE), client, backend).expect(generation)
}

// Run does the jobs added since the last Run. Their results stand until the next job is added.
func (j *Jobs) Run() error {
	j.args.Count = uint32(j.count)
	j.count = 0
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&j.attr)), unsafe.Sizeof(j.attr))
	if errno != 0 {
		return fmt.Errorf("run the flow jobs: %w", errno)
	}
	if ret := int32(j.attr.retval); ret != 0 {
		return fmt.Errorf("run the flow jobs: %w", syscall.Errno(-ret))
	}
	return nil
}

// Result is how a job of the last Run ended, by its place: as Bind says, and for Read an error that is ebpf.ErrKeyNotExist
// if the flow has not both entries.
func (j *Jobs) Result(i int) error {
	switch errno := syscall.Errno(-j.jobs[i].Result); {
	case errno == 0:
		return nil
	case errors.Is(errno, unix.EEXIST):
		return ebpf.ErrKeyExist
	case errors.Is(errno, unix.ENOENT):
		return ebpf.ErrKeyNotExist
	default:
		return errno
	}
}

// Flows are both directions' flows as a Read of the last Run found them, without their addresses.
func (j *Jobs) Flows(i int) (up, down Entry) {
	return Entry{Flow: j.jobs[i].Up.Flow}, Entry{Flow: j.jobs[i].Down.Flow}
}

func value6(e *Entry) Flow6 {
	v := Flow6{Flow: e.Flow, Saddr: Words(e.To.Src.Addr()), Daddr: Words(e.To.Dst.Addr())}
	v.Flow.Sport, v.Flow.Dport = Port(e.To.Src.Port()), Port(e.To.Dst.Port())
	return v
}
