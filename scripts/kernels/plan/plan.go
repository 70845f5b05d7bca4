// SPDX-License-Identifier: Apache-2.0

// Package plan is what `make test-kernels` tells the first process of its virtual machines.
package plan

// File is where a [Plan] lies in the machine, as JSON.
const File = "/plan.json"

// Passed is the line on the console that says that every step went well.
const Passed = "kernels: passed"

// Plan is all that a machine does.
type Plan struct {
	Modules []string // files, each after those it depends on
	Env     []string // of the steps
	Steps   []Step
}

// Step is one program to run.
type Step struct {
	Name string
	Dir  string
	Argv []string
}
