// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// capSet holds capabilities as bits.
type capSet uint64

const (
	capBPF      = capSet(1) << unix.CAP_BPF
	capNetAdmin = capSet(1) << unix.CAP_NET_ADMIN
	capNetRaw   = capSet(1) << unix.CAP_NET_RAW
	capPerfmon  = capSet(1) << unix.CAP_PERFMON
	capSysAdmin = capSet(1) << unix.CAP_SYS_ADMIN
)

// capabilities are a thread's.
type capabilities struct {
	effective, permitted, inheritable capSet
}

// loading keeps DropPrivileges and the loading of programs apart: a thread whose
// capabilities differ just then would be a fault to what changes all threads' at once.
var loading sync.RWMutex

// remaining returns what a daemon keeps of its capabilities after Attach. Where one that
// it works by is missing, CAP_SYS_ADMIN stands for it and has to stay.
func remaining(permitted capSet) (effective, kept capSet) {
	effective = permitted & (capBPF | capNetAdmin | capNetRaw)
	if permitted&capBPF == 0 || permitted&capPerfmon == 0 {
		effective |= permitted & capSysAdmin
	}
	return effective, effective | permitted&capPerfmon
}

// DropPrivileges takes from all threads of the process what a daemon does not need after
// Attach, for good, and forbids to gain any. CAP_PERFMON stays permitted, and is used
// while a program is loaded for an interface that comes back. What the kernel refuses is
// returned as warnings, if it leaves a way to gain something.
func DropPrivileges() []Problem {
	loading.Lock()
	defer loading.Unlock()
	have, err := getCapabilities()
	if err != nil {
		return []Problem{keptPrivileges("all of its capabilities", err)}
	}
	effective, kept := remaining(have.permitted)
	var problems []Problem
	if kept&capSysAdmin != 0 {
		problems = append(problems, Problem{
			What:    "this process keeps CAP_SYS_ADMIN, as it was not given CAP_BPF and CAP_PERFMON",
			Remedy:  "give it these two instead",
			Warning: true,
		})
	}
	// First, as it wants CAP_SETPCAP.
	left, boundingErr := dropBounding(kept)
	// What is not inheritable is not ambient either.
	if err := setAllThreads(capabilities{effective: effective, permitted: kept}); err != nil {
		problems = append(problems, keptPrivileges("all of its capabilities", err))
	}
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		problems = append(problems, keptPrivileges("the right to gain privileges", errno))
		// Without that right the bounding set gives nobody anything, and what stays in it is no news.
		if boundingErr != nil {
			problems = append(problems, Problem{
				What:    fmt.Sprintf("%d capabilities stay in the bounding set: %v", left, boundingErr),
				Remedy:  "start it with CAP_SETPCAP, or with these few in the bounding set (CapabilityBoundingSet= in systemd)",
				Warning: true,
			})
		}
	}
	return problems
}

func keptPrivileges(what string, err error) Problem {
	return Problem{
		What:    fmt.Sprintf("this process keeps %s: %v", what, err),
		Remedy:  "see what filters its system calls (seccomp), or start it with " + strings.Join(capNames(capBPF|capNetAdmin|capNetRaw|capPerfmon), ", ") + " only",
		Warning: true,
	}
}

// dropBounding takes everything else out of the bounding set. It goes on after an error,
// and returns the last one and how many it could not take.
func dropBounding(kept capSet) (left int, err error) {
	for c := range uintptr(64) {
		// An unknown capability is an error: they end there.
		in, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_READ, c, 0)
		if errno != 0 {
			break
		}
		if in == 0 || kept&(1<<c) != 0 {
			continue
		}
		if _, _, errno := psx.Syscall3(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0); errno != 0 {
			left, err = left+1, errno
		}
	}
	return left, err
}

// withPerfmon runs f, which loads a program, on a thread that may do what the verifier
// wants CAP_PERFMON for.
func withPerfmon(f func() error) (err error) {
	loading.RLock()
	defer loading.RUnlock()
	runtime.LockOSThread()
	have, err := getCapabilities()
	if err != nil || have.effective&capPerfmon != 0 || have.permitted&capPerfmon == 0 {
		defer runtime.UnlockOSThread()
		return errors.Join(err, f())
	}
	more := have
	more.effective |= capPerfmon
	if err := setCapabilities(more); err != nil {
		defer runtime.UnlockOSThread()
		return fmt.Errorf("raise CAP_PERFMON: %w", err)
	}
	defer func() {
		back := setCapabilities(have)
		if back == nil {
			runtime.UnlockOSThread()
		} // else the thread stays locked and ends with its goroutine
		err = errors.Join(err, back)
	}()
	return f()
}

// getCapabilities returns the calling thread's.
func getCapabilities() (capabilities, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return capabilities{}, fmt.Errorf("read capabilities: %w", err)
	}
	join := func(low, high uint32) capSet { return capSet(low) | capSet(high)<<32 }
	return capabilities{
		effective:   join(data[0].Effective, data[1].Effective),
		permitted:   join(data[0].Permitted, data[1].Permitted),
		inheritable: join(data[0].Inheritable, data[1].Inheritable),
	}, nil
}

// setCapabilities sets the calling thread's.
func setCapabilities(c capabilities) error {
	header, data := c.words()
	return unix.Capset(header, &data[0])
}

// setAllThreads sets those of each thread of the process. They are the kernel's to keep
// by thread, and Go's threads are many; psx makes each of them do the call, whether the
// binary has C in it (by a signal) or not (by the runtime, which refuses to with C).
func setAllThreads(c capabilities) error {
	header, data := c.words()
	_, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(&data[0])), 0)
	runtime.KeepAlive(header)
	runtime.KeepAlive(data)
	if errno != 0 {
		return errno
	}
	return nil
}

// words is what the system calls take. On the heap: a stack may move while all threads
// are at it.
func (c capabilities) words() (*unix.CapUserHeader, *[2]unix.CapUserData) {
	data := new([2]unix.CapUserData)
	for n := range data {
		shift := 32 * n
		data[n].Effective, data[n].Permitted, data[n].Inheritable = uint32(c.effective>>shift), uint32(c.permitted>>shift), uint32(c.inheritable>>shift)
	}
	return &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, data
}

// capNames lists those of the set that the loader has names for.
func capNames(c capSet) []string {
	var names []string
	for _, known := range []struct {
		set  capSet
		name string
	}{
		{capNetAdmin, "CAP_NET_ADMIN"}, {capBPF, "CAP_BPF"}, {capPerfmon, "CAP_PERFMON"}, {capNetRaw, "CAP_NET_RAW"},
		{capSysAdmin, "CAP_SYS_ADMIN"},
	} {
		if c&known.set != 0 {
			names = append(names, known.name)
		}
	}
	return names
}
