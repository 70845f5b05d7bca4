// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// recvTrunc is recvfrom(2) with MSG_TRUNC and no address: the kernel drops up to n bytes of the stream and writes none.
// The wrapper of x/sys/unix takes a slice of n bytes and makes an address for each call.
func recvTrunc(fd uintptr, unused *byte, n int) (int, error) {
	m, _, errno := unix.Syscall6(unix.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(unused)), uintptr(n), unix.MSG_TRUNC, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(m), nil
}
