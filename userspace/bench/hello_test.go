// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"slices"
	"testing"

	"snilb/userspace/hello"
)

// TestHelloLayouts reads every layout by the product's own parser, in one record and in many.
func TestHelloLayouts(t *testing.T) {
	sizes := map[string][2]int{"go": {1450, 2000}, "chrome": {1450, 2200}, "go-classic": {200, 600}, "android": {150, 600}}
	for _, layout := range Layouts() {
		for _, record := range []int{0, 7} {
			t.Run(fmt.Sprintf("%s/%d", layout, record), func(t *testing.T) {
				h := testHellos(t, HelloOptions{
					Layout: layout, RecordBytes: record, ALPN: []string{"own"},
					Names: Names{List: []string{"a.example.com"}},
				})
				flight, err := h.of(0)
				if err != nil {
					t.Fatal(err)
				}
				got, err := hello.Parse(flight)
				if err != nil || got.ServerName != "a.example.com" {
					t.Fatalf("%+v, %v", got, err)
				}
				if layout != "android" && !slices.Equal(got.ALPN, []string{"own"}) { // okhttp of Android 11 offers none
					t.Errorf("ALPN %q", got.ALPN)
				}
				if size, ok := sizes[layout]; ok && record == 0 && (len(flight) < size[0] || len(flight) > size[1]) {
					t.Errorf("%d bytes, want %v", len(flight), size)
				}
				nobody, err := h.of(nameless)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := hello.Parse(nobody); err != nil || got.ServerName != "" {
					t.Errorf("without a name: %+v, %v", got, err)
				}
			})
		}
	}
}

// TestPicker draws names as often as they are wanted.
func TestPicker(t *testing.T) {
	list, err := Numbered("site-#.example.com", 1000)
	if err != nil || list[7] != "site-7.example.com" {
		t.Fatal(list[:8], err)
	}
	const draws = 100_000
	for name, tt := range map[string]struct {
		names    Names
		without  [2]int // draws, from and to
		favorite [2]int
	}{
		"alike":         {Names{List: list}, [2]int{0, 0}, [2]int{40, 200}},
		"Zipf":          {Names{List: list, Skew: 1.2}, [2]int{0, 0}, [2]int{draws / 10, draws / 2}},
		"some nameless": {Names{List: list, Without: 0.25}, [2]int{draws / 5, draws * 3 / 10}, [2]int{20, 200}},
		"all nameless":  {Names{Without: 1}, [2]int{draws, draws}, [2]int{0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			counts := map[int]int{}
			p := newPicker(tt.names, 1)
			for range draws {
				counts[p.next()]++
			}
			if n := counts[nameless]; n < tt.without[0] || n > tt.without[1] {
				t.Errorf("%d without a name, want %v", n, tt.without)
			}
			if n := counts[0]; n < tt.favorite[0] || n > tt.favorite[1] {
				t.Errorf("the first name %d times, want %v", n, tt.favorite)
			}
		})
	}
}

func TestBadHellos(t *testing.T) {
	one := Names{List: []string{"a"}}
	for name, o := range map[string]HelloOptions{
		"layout":    {Layout: "lynx", Names: one},
		"no names":  {Layout: "go"},
		"skew":      {Layout: "go", Names: Names{List: one.List, Skew: 0.5}},
		"share":     {Layout: "go", Names: Names{List: one.List, Without: 2}},
		"record":    {Layout: "go", Names: one, RecordBytes: 1 << 15},
		"segment":   {Layout: "go", Names: one, SegmentBytes: -1},
		"long name": {Layout: "go", Names: Names{List: []string{string(make([]byte, 70000))}}},
	} {
		if _, err := NewHellos(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for _, bad := range []struct {
		pattern string
		count   int
	}{{"same", 2}, {"#", 0}, {"#", 1 << 21}} {
		if _, err := Numbered(bad.pattern, bad.count); err == nil {
			t.Errorf("%d names of %q: no error", bad.count, bad.pattern)
		}
	}
}
