// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"io"
	"os"
)

// MaxFileSize is the largest file that is read. A route takes about 60 bytes.
const MaxFileSize = 16 << 20

// Load reads and validates a file. It returns Problems when the file's content
// is at fault, and another error when it cannot be read.
func Load(path string) (*Config, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	defer func() { _ = file.Close() }()

	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	if info.IsDir() {
		return nil, Problems{{
			Position: Position{File: path},
			What:     "a directory is not supported yet",
			Remedy:   "name a file",
		}}
	}
	// One byte more than allowed, so that Parse sees that it is too much.
	data, err := io.ReadAll(io.LimitReader(file, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	return Parse(path, data)
}

// Parse validates the content of a file; name is only for positions. It returns
// Problems when anything is wrong.
func Parse(name string, data []byte) (*Config, error) {
	return nil, fmt.Errorf("parse %s: not built yet", name)
}
