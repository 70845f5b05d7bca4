// SPDX-License-Identifier: Apache-2.0

package config

import "golang.org/x/net/idna"

// international turns U-labels into A-labels. What a name may hold beyond that
// is checked by CanonicalName and not by a profile: profiles refuse the
// underscore.
var international = idna.New(idna.MapForLookup(), idna.Transitional(false), idna.StrictDomainName(false)).ToASCII
