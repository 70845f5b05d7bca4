// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// archive writes an initramfs: a cpio archive of the kind "newc", which the kernel unpacks as its root file system.
type archive struct {
	out     *bufio.Writer
	written int64
	inode   int
	names   map[string]bool // every name is written once, with its directories in front of it
	err     error           // the first one; Close returns it
}

func newArchive(w io.Writer) *archive {
	return &archive{out: bufio.NewWriter(w), names: map[string]bool{"/": true, ".": true}}
}

const (
	cpioDir  = 0o040000
	cpioFile = 0o100000
	cpioNode = 0o020000 // a character device
)

// addFile puts a file of this machine into the archive. A name that is there already stays what it is.
func (a *archive) addFile(name, from string) {
	if a.err != nil || a.names[name] {
		return
	}
	data, err := os.ReadFile(from)
	if err != nil {
		a.err = err
		return
	}
	info, err := os.Stat(from)
	if err != nil {
		a.err = err
		return
	}
	a.add(name, data, info.Mode().Perm())
}

func (a *archive) add(name string, data []byte, perm fs.FileMode) {
	a.entry(name, cpioFile|uint32(perm), 0, data)
}

// addDir makes a directory, as a place to mount something or to write to.
func (a *archive) addDir(name string) { a.entry(name, cpioDir|0o755, 0, nil) }

// addConsole makes the device that the first process gets as its standard input and output.
func (a *archive) addConsole() { a.entry("/dev/console", cpioNode|0o600, 1, nil) }

// entry writes one member, its directories first. minor is that of a device with the major number 5.
func (a *archive) entry(name string, mode, minor uint32, data []byte) {
	if a.names[name] {
		return
	}
	a.names[name] = true
	a.addDir(path.Dir(name))
	a.inode++
	a.member(name[1:], a.inode, mode, minor, data)
}

func (a *archive) member(name string, inode int, mode, minor uint32, data []byte) {
	major := uint32(0)
	if minor != 0 {
		major = 5
	}
	fields := []uint32{uint32(inode), mode, 0, 0, 1, 0, uint32(len(data)), 0, 0, major, minor, uint32(len(name) + 1), 0}
	a.write([]byte("070701"))
	for _, f := range fields {
		a.write(fmt.Appendf(nil, "%08x", f))
	}
	a.write(append([]byte(name), 0))
	a.pad()
	a.write(data)
	a.pad()
}

// pad fills up to a multiple of four bytes, where the format wants headers and data to begin.
func (a *archive) pad() { a.write(make([]byte, -a.written&3)) }

func (a *archive) write(p []byte) {
	if a.err == nil {
		_, a.err = a.out.Write(p)
	}
	a.written += int64(len(p))
}

// Close ends the archive and returns what went wrong, if anything did.
func (a *archive) Close() error {
	a.member("TRAILER!!!", 0, 0, 0, nil)
	if a.err != nil {
		return a.err
	}
	return a.out.Flush()
}
