// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"snilb/userspace/config"
)

// What the running tables and programs cannot do is refused where it stands, and says what they can.
func TestReloadFixed(t *testing.T) {
	s := &server{o: attachOptions{sourcePorts: [2]uint16{10000, 29999}}, flowEntries: 1000, ports: [2]uint16{9000, 29999}}
	named := &server{o: s.o, flowEntries: 1000, ports: [2]uint16{9000, 9999}} // all pools named ports when it began
	for _, c := range []struct {
		what         string
		server       *server
		limits, pool string
		want         string
	}{
		{"the same", s, "{flows: 1000}", "", ""},
		{"fewer flows", s, "{flows: 10}", "", ""},
		{"more flows", s, "{flows: 1001}", "", "limits.flows is 1001, and the tables were made for 1000"},
		{"ports within", s, "{flows: 10}", `source: {ports: "9000-9099"}, `, ""},
		{"ports below", s, "{flows: 10}", `source: {ports: "8999-9099"}, `, "source ports of pool p are 8999-9099, and the programs were loaded for 9000-29999"},
		{"ports above", s, "{flows: 10}", `source: {ports: "9000-30000"}, `, "source ports of pool p are 9000-30000"},
		{"no ports", named, "{flows: 10}", "", "source ports of pool p are 10000-29999"},
	} {
		file, err := config.Load(write(t, "version: 1\nlisten: \":443\"\nlimits: "+c.limits+"\npools:\n  p: {"+c.pool+"backends: 192.0.2.1:443}\nroutes: [{sni: a.example.com, pool: p}]\n"))
		if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		got := c.server.fixed(file)
		if len(got) > 1 || (len(got) == 0) != (c.want == "") || len(got) == 1 && (!strings.Contains(got[0].What, c.want) || !strings.Contains(got[0].Remedy, "start")) {
			t.Errorf("%s: %v, want %q", c.what, got, c.want)
		}
	}
}
