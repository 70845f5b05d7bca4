// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"snilb/userspace/api"
	"snilb/userspace/engine"
)

func flowsCommand() *cli.Command {
	return reader("flows", "List the connections", formatTable,
		func(c *cli.Context, format string, client *api.Client) error {
			return printFlows(c.Context, c.App.Writer, format, client.Flows)
		})
}

// flowSource calls a function for every flow.
type flowSource func(context.Context, func(json.RawMessage) error) error

// printFlows prints flows as they come: there may be a million. Those of a table, of which the widths are known only at the end, by
// their clients.
func printFlows(ctx context.Context, out io.Writer, format string, flows flowSource) error {
	switch format {
	case formatJSON:
		return printFlowArray(ctx, out, flows)
	case formatLines:
		return flows(ctx, func(raw json.RawMessage) error { return printDocument(out, format, raw) })
	}
	var all []engine.Flow
	err := flows(ctx, func(raw json.RawMessage) error {
		var f engine.Flow
		if err := json.Unmarshal(raw, &f); err != nil {
			return fmt.Errorf("read a flow: %w", err)
		}
		all = append(all, f)
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b engine.Flow) int { return cmp.Compare(a.Client, b.Client) })
	w := newTable(out)
	_, _ = fmt.Fprint(w, "client\tlistener\tsni\tpool\tbackend\tstate\tage\tidle\tin\tout\n")
	for _, f := range all {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\n", f.Client, f.Listener, orWords(f.SNI, "-"), orWords(f.Pool, "-"),
			orWords(f.Backend, "-"), f.State, roundSeconds(f.Age), roundSeconds(f.Idle), f.BytesIn, f.BytesOut)
	}
	return w.Flush()
}

// printFlowArray prints one flow a line within the brackets. Nothing is printed if
// there is an error before the first.
func printFlowArray(ctx context.Context, out io.Writer, flows flowSource) error {
	between := "[\n  "
	err := flows(ctx, func(raw json.RawMessage) error {
		_, err := fmt.Fprintf(out, "%s%s", between, bytes.TrimSpace(raw))
		between = ",\n  "
		return err
	})
	if err != nil {
		return err
	}
	end := "\n]\n"
	if between == "[\n  " {
		end = "[]\n"
	}
	_, err = io.WriteString(out, end)
	return err
}

func roundSeconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(100 * time.Millisecond)
}
