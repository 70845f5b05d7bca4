// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

const budgetFile = "testdata/verifier-budget.json"

// cost is what the verifier says of a program. It grows with the kernel as well as
// with the program; all kernels give up at a million instructions walked and at 512
// bytes of stack.
type cost struct {
	Instructions int `json:"instructions"` // walked, of all paths
	Stack        int `json:"stack"`        // bytes, of the entry and the deepest function
}

// verifierCost loads a program by itself and reads the verifier's last lines.
func verifierCost(t *testing.T, name string) cost {
	t.Helper()
	needRoot(t)
	spec := testSpec(t, settings{workers: 4, ringSize: defaultRing, onDead: OnDeadReset, xdp: name == ProgramXDP})
	for other := range spec.Programs {
		if other != name {
			delete(spec.Programs, other)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats},
	})
	if err != nil {
		_, err = ebpf.NewCollection(spec) // now with the reason, at the end of the way there
		var refused *ebpf.VerifierError
		if errors.As(err, &refused) {
			t.Fatalf("%v\n%s", err, strings.Join(refused.Log[max(0, len(refused.Log)-40):], "\n"))
		}
	}
	must(t, err)
	defer coll.Close()
	c, err := parseCost(coll.Programs[name].VerifierLog)
	must(t, err)
	return c
}

var (
	processedInsns = regexp.MustCompile(`processed (\d+) insns`)
	stackDepth     = regexp.MustCompile(`stack depth ([\d+]+)`)
)

func parseCost(log string) (cost, error) {
	var c cost
	processed, stack := processedInsns.FindStringSubmatch(log), stackDepth.FindStringSubmatch(log)
	if processed == nil || stack == nil {
		return c, errors.New("no statistics in the verifier's log: " + log)
	}
	c.Instructions, _ = strconv.Atoi(processed[1])
	// One number a function, the entry first, and no word of who calls whom. The entry
	// and the deepest of the others is what can be watched; the whole chain the
	// verifier holds against its limit itself.
	deepest := 0
	for i, text := range strings.Split(stack[1], "+") {
		depth, err := strconv.Atoi(text)
		switch {
		case err != nil:
			return c, fmt.Errorf("stack depth %q: %w", stack[1], err)
		case i == 0:
			c.Stack = depth
		default:
			deepest = max(deepest, depth)
		}
	}
	c.Stack += deepest
	return c, nil
}

func TestParseCost(t *testing.T) {
	log := "verification time 1 usec\nstack depth 200+0+120+64\nprocessed 4711 insns (limit 1000000) max_states_per_insn 4"
	if c, err := parseCost(log); err != nil || c != (cost{4711, 320}) {
		t.Errorf("read %+v, %v", c, err)
	}
	if _, err := parseCost("processed 4711 insns"); err == nil {
		t.Error("a log without stack depth has a cost")
	}
}

// A program that costs the verifier much more than it did may not load on an older
// kernel. The budget has headroom for those; who needs more looks first at what
// doubled the paths, then runs this test with SNILB_BUDGET=write and commits the
// file with the reason.
func TestVerifierBudget(t *testing.T) {
	got := make(map[string]cost)
	for _, name := range []string{ProgramClient, ProgramBackend, ProgramTap, ProgramXDP} {
		t.Run(name, func(t *testing.T) {
			got[name] = verifierCost(t, name)
			t.Logf("%s: %+v", name, got[name])
		})
	}
	if os.Getenv("SNILB_BUDGET") == "write" {
		writeBudget(t, got)
	}
	text, err := os.ReadFile(budgetFile)
	must(t, err)
	var budget map[string]cost
	must(t, json.Unmarshal(text, &budget))
	for name, c := range got {
		b := budget[name]
		if c.Instructions > b.Instructions || c.Stack > b.Stack {
			t.Errorf("%s costs %+v, over its budget of %+v: see the comment of this test", name, c, b)
		}
		if c.Instructions*4 < b.Instructions {
			t.Errorf("%s costs %+v, a budget of %+v guards nothing: lower it", name, c, b)
		}
	}
	if len(budget) != len(got) {
		t.Errorf("%s has %d programs, not %d", budgetFile, len(budget), len(got))
	}
}

func writeBudget(t *testing.T, got map[string]cost) {
	t.Helper()
	budget := make(map[string]cost)
	for name, c := range got {
		budget[name] = cost{Instructions: (c.Instructions*2 + 999) / 1000 * 1000, Stack: min(c.Stack+32, 512)}
	}
	text, err := json.MarshalIndent(budget, "", "\t")
	must(t, err)
	must(t, os.WriteFile(budgetFile, append(text, '\n'), 0o644))
}
