// SPDX-License-Identifier: Apache-2.0

//go:build !idna

package config

import "errors"

// international refuses U-labels: golang.org/x/net/idna needs a module that
// go.mod does not name yet. With it there, this file and the build tag go.
func international(string) (string, error) {
	return "", errors.New("international names are not supported yet, write A-labels (xn--)")
}
