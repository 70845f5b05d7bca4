// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os/user"
	"strconv"
	"strings"

	"snilb/userspace/api"
)

// readOwner reads USER or USER:GROUP, by names or numbers; nil if there is none.
func readOwner(word string) (*api.Owner, error) {
	if word == "" {
		return nil, nil
	}
	userName, groupName, hasGroup := strings.Cut(word, ":")
	owner := &api.Owner{GID: -1}
	var err error
	if owner.UID, err = readID(userName, userID); err == nil && hasGroup {
		owner.GID, err = readID(groupName, groupID)
	}
	if err != nil {
		return nil, fmt.Errorf("--api-owner %q: %w: use USER or USER:GROUP of this machine", word, err)
	}
	return owner, nil
}

// readID looks a name up, and takes a number for itself where there is no such name.
func readID(name string, lookup func(string) (string, error)) (int, error) {
	text, err := lookup(name)
	if err != nil {
		text = name
	}
	// The largest number means "leave it as it is" to the kernel.
	id, parseErr := strconv.ParseUint(text, 10, 32)
	if parseErr != nil || id == 1<<32-1 {
		return 0, err
	}
	return int(id), nil
}

func userID(name string) (string, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return "", err
	}
	return u.Uid, nil
}

func groupID(name string) (string, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return "", err
	}
	return g.Gid, nil
}
