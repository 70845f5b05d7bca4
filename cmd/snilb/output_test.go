// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"snilb/maps"
	"snilb/userspace/config"
	"snilb/userspace/engine"
)

func source(objects ...string) flowSource {
	return func(_ context.Context, each func(json.RawMessage) error) error {
		for _, o := range objects {
			if err := each(json.RawMessage(o)); err != nil {
				return err
			}
		}
		return nil
	}
}

func TestPrintFlows(t *testing.T) {
	const a = `{"client":"192.0.2.9:5","listener":"192.0.2.1:443","sni":"a.example.com","pool":"p","backend":"192.0.2.2:443","state":"open","age_seconds":1.25,"idle_seconds":0.5,"bytes_in":3,"bytes_out":4}`
	const b = `{"client":"192.0.2.9:6","listener":"192.0.2.1:443","state":"hello"}`
	for _, tt := range []struct{ format, want string }{
		{"json", "[\n  " + a + ",\n  " + b + "\n]\n"},
		{"jsonl", a + "\n" + b + "\n"},
		{"table", "client       listener       sni            pool  backend        state  age   idle   in  out\n" +
			"192.0.2.9:5  192.0.2.1:443  a.example.com  p     192.0.2.2:443  open   1.3s  500ms  3   4\n" +
			"192.0.2.9:6  192.0.2.1:443  -              -     -              hello  0s    0s     0   0\n"},
	} {
		var out bytes.Buffer
		err := printFlows(t.Context(), &out, tt.format, source(a, b))
		if d := cmp.Diff(tt.want, out.String()); d != "" || err != nil {
			t.Errorf("%s: %v, -want +got:\n%s", tt.format, err, d)
		}
	}
	var out bytes.Buffer
	if err := printFlows(t.Context(), &out, "table", source(b, a)); err != nil || strings.Index(out.String(), ":5 ") > strings.Index(out.String(), ":6 ") {
		t.Errorf("a table is not by clients: %v\n%s", err, &out)
	}
	out.Reset()
	if err := printFlows(t.Context(), &out, "json", source()); err != nil || out.String() != "[]\n" {
		t.Errorf("none: %q, %v", out.String(), err)
	}
	out.Reset()
	broken := func(context.Context, func(json.RawMessage) error) error { return errors.New("gone") }
	if err := printFlows(t.Context(), &out, "json", broken); err == nil || out.Len() > 0 {
		t.Errorf("broken: %q, %v", out.String(), err)
	}
}

func TestPrintStatus(t *testing.T) {
	raw := json.RawMessage(`{"name":"edge","pid":7,"version":"v1","uptime_seconds":61.2,"ready":true,"goroutines":23,"routes":"r.yaml","reload":{"ok":false,"at":"2026-01-02T03:04:05Z","error":"r.yaml:1:2: bad\nr.yaml:2:2: worse"},` +
		`"listeners":[{"name":":443"}],"interfaces":[{"name":"eth0","role":"xdp","mode":"xdp","hook":"xdp","packets":{"pass/not_tcp":3,"pass/left_frame":1,"answer/syn":5}},` +
		`{"name":"eth0","role":"client","mode":"tc","hook":"tcx","packets":{"pass/not_tcp":2,"answer/syn":1}}],` +
		`"pools":[{"name":"p","balance":"maglev","backends":[{"name":"b","address":"192.0.2.2:443","weight":1}]}],` +
		`"engine":{"flows":10000000,"hellos":{"ok":2},"decisions":[{"pool":"p","count":2}],"connects":null}}`)
	want := `instance   edge (pid 7, version v1)
state      ready for 1m1s, 23 goroutines
routes     r.yaml
           reload failed at %s, the earlier ones are in force: r.yaml:1:2: bad (and more)
listener   :443
interface  eth0 xdp, xdp by xdp: took 5 packets, passed 4
           answer/syn 5
           pass/left_frame 1
           pass/not_tcp 3
interface  eth0 client, tc by tcx: took 1 packets, passed 2
           answer/syn 1
           pass/not_tcp 2
pool       p, maglev
           192.0.2.2:443 name b weight 1
decisions  count 2  pool p
flows      10000000
hellos ok  2
`
	want = fmt.Sprintf(want, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Local().Format(time.DateTime))
	var out bytes.Buffer
	err := printStatus(&out, "table", raw)
	if d := cmp.Diff(want, out.String()); d != "" || err != nil {
		t.Errorf("table: %v, -want +got:\n%s", err, d)
	}
	out.Reset()
	if err := printStatus(&out, "jsonl", raw); err != nil || out.String() != string(raw)+"\n" {
		t.Errorf("jsonl: %q, %v", out.String(), err)
	}
	out.Reset()
	err = printStatus(&out, "json", json.RawMessage(`{"name":"edge","ready":false,"draining":true}`))
	if err == nil || err.Error() != "daemon edge does not steer: draining" || !strings.Contains(out.String(), "\n  \"ready\": false,\n") {
		t.Errorf("draining: %q, %v", out.String(), err)
	}
	err = printStatus(&out, "json", json.RawMessage(`{"name":"edge","ready":false,"draining":false,"leaving":true}`))
	if err == nil || err.Error() != "daemon edge does not steer: leaving" {
		t.Errorf("leaving: %v", err)
	}
}

func TestSummarize(t *testing.T) {
	c, err := config.Load(write(t, routesFile))
	if err != nil {
		t.Fatal(err)
	}
	d := summarize(c)
	if got := []string{d.Listeners[0].Address, d.Listeners[1].Address, d.Listeners[1].NoMatch, d.Pools[1].Hash, d.Pools[0].Hash, d.Routes[0].ALPN[0],
		d.Listeners[1].AcceptProxy[0], d.Pools[0].ProxyProtocol, d.Pools[1].ProxyProtocol}; cmp.Diff([]string{":443", "192.0.2.20:443", "pool:b", "client", "", "h2", "192.0.2.128/25", "none", "v2"}, got) != "" {
		t.Errorf("%q", got)
	}
	if diff := cmp.Diff(map[string]int{"a": 3, "b": 1}, d.Routes[2].Pools); diff != "" {
		t.Error(diff)
	}
	plan, err := engine.NewPlan(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	specs := listenerSpecs(c, plan)
	if len(specs) != 2 || specs[0].ID != 1 || specs[1].ID != 2 || specs[1].Addr.String() != "192.0.2.20:443" || specs[0].UnknownFlow != maps.UnknownFlowReset {
		t.Errorf("%+v", specs)
	}
}

func TestNamePackets(t *testing.T) {
	var set maps.CounterSet
	for i := range set.Packets {
		set.Packets[i] = 1
	}
	named := namePackets(set)
	for _, r := range maps.Reasons[1:] {
		if named[string(r.Action)+"/"+r.Name] != 1 {
			t.Errorf("%s/%s: %d", r.Action, r.Name, named[string(r.Action)+"/"+r.Name])
		}
	}
	if got := namePackets(maps.CounterSet{}); len(got) != 0 {
		t.Errorf("nothing happened: %v", got)
	}
}
