// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
)

const (
	formatTable = "table"
	formatJSON  = "json"
	formatLines = "jsonl"
)

func outputFlag(value string) cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FORMAT`: table, json or jsonl", Value: value}
}

// outputFormat reads the flag that outputFlag made.
func outputFormat(c *cli.Context) (string, error) {
	format := c.String("output")
	if !slices.Contains([]string{formatTable, formatJSON, formatLines}, format) {
		return "", cli.Exit(fmt.Sprintf("-o cannot be %q: use table, json or jsonl", format), exitUsage)
	}
	return format, nil
}

// printDocument prints one JSON document, indented for json.
func printDocument(out io.Writer, format string, raw json.RawMessage) error {
	var b bytes.Buffer
	var err error
	if format == formatJSON {
		err = json.Indent(&b, bytes.TrimSpace(raw), "", "  ")
	} else {
		err = json.Compact(&b, raw)
	}
	if err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	b.WriteByte('\n')
	_, err = out.Write(b.Bytes())
	return err
}

// newTable aligns columns that tabs end.
func newTable(out io.Writer) *tabwriter.Writer {
	return tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
}

// writeTree prints any decoded JSON object, a line a leaf or list item: its path by
// words, and its value.
func writeTree(out io.Writer, path string, value any) {
	switch v := value.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			writeTree(out, strings.TrimSpace(path+" "+key), v[key])
		}
	case []any:
		for _, item := range v {
			_, _ = fmt.Fprintf(out, "%s\t%s\n", path, leaf(item))
		}
	case nil:
	default:
		_, _ = fmt.Fprintf(out, "%s\t%s\n", path, leaf(v))
	}
}

// leaf prints a value on one line.
func leaf(value any) string {
	switch v := value.(type) {
	case map[string]any:
		words := make([]string, 0, len(v))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if text := leaf(v[key]); text != "" {
				words = append(words, key+" "+text)
			}
		}
		return strings.Join(words, "  ")
	case []any:
		words := make([]string, len(v))
		for i, item := range v {
			words[i] = leaf(item)
		}
		return strings.Join(words, ", ")
	case nil:
		return ""
	default:
		return fmt.Sprint(v)
	}
}

// decodeTree decodes JSON for writeTree. Numbers keep their digits.
func decodeTree(raw json.RawMessage) (any, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.UseNumber()
	var v any
	if err := decoder.Decode(&v); err != nil {
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	}
	return v, nil
}
