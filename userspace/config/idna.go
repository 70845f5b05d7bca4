// SPDX-License-Identifier: Apache-2.0

package config

import "errors"

// international turns U-labels into A-labels.
func international(string) (string, error) {
	return "", errors.New("write its A-label (xn--...)")
}
