// SPDX-License-Identifier: Apache-2.0

// Package config reads routes.yaml and hands out plain, resolved data.
//
// Load and Parse either return a Config in which every name is resolved, every
// default filled in and every rule of the file format kept, or an error of type
// Problems that lists everything wrong with the file, not only the first thing.
//
// The package never looks at the machine it runs on: the same file gets the
// same answer everywhere. What depends on the machine (can this node reach that
// backend?) is asked elsewhere.
package config
