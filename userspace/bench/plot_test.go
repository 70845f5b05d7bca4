// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"image/png"
	"os"
	"path/filepath"
	"testing"
)

func TestPlot(t *testing.T) {
	l := testLoad(t, startServer(t, 1))
	run, err := Connections(t.Context(), l, SocketOptions{})
	allSucceed(t, run, err)
	for name, res := range map[string]*Result{
		"run": run, "nothing": {Kind: "connections"},
		"bulk": {Kind: "bulk", Every: []Second{{At: 1, Seconds: 1, Bytes: 1e9}, {At: 2, Seconds: 1, Bytes: 2e9}}},
	} {
		dir := t.TempDir()
		svg, image := filepath.Join(dir, "x.svg"), filepath.Join(dir, "x.PNG")
		for _, file := range []string{svg, image} {
			if err := res.WritePlot(file); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		text, err := os.ReadFile(svg)
		if err != nil || !bytes.Contains(text, []byte(res.Kind+" to")) || !bytes.HasSuffix(bytes.TrimSpace(text), []byte("</svg>")) {
			t.Errorf("%s: %v, %.200s", name, err, text)
		}
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := png.Decode(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_ = f.Close()
	}
	if err := run.WritePlot(filepath.Join(t.TempDir(), "x.pdf")); err == nil {
		t.Error("a PDF: no error")
	}
}
