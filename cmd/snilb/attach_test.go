// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"snilb/loader"
	"snilb/userspace/api"
)

// parseAttach reads a command line without attaching.
func parseAttach(t *testing.T, line string) (o attachOptions, errText string) {
	t.Helper()
	command := attachCommand()
	command.Action = func(c *cli.Context) (err error) {
		o, err = readAttachOptions(c)
		return err
	}
	app := &cli.App{Commands: []*cli.Command{command}, Writer: &bytes.Buffer{}, ErrWriter: &bytes.Buffer{}, ExitErrHandler: func(*cli.Context, error) {}}
	if err := app.Run(flagsAnywhere(app, append([]string{"snilb", "attach"}, strings.Fields(line)...))); err != nil {
		return o, err.Error()
	}
	return o, ""
}

func TestAttachOptions(t *testing.T) {
	o, errText := parseAttach(t, "eth0 eth1=tc eth2=xdp --routes r.yaml --name edge --order last --api /x.sock --dead-after 4s --drain-timeout 0s --log-format json --workers 3 --source-ports 20000-20003 --mode xdp-generic --on-exit keep --on-dead hold")
	want := attachOptions{
		interfaces: []loader.Interface{{Name: "eth0"}, {Name: "eth1", Mode: loader.ModeTC}, {Name: "eth2", Mode: loader.ModeXDP}},
		mode:       loader.ModeXDPGeneric, routes: "r.yaml", name: "edge", socket: "/x.sock", order: loader.OrderLast,
		deadAfter: 4 * time.Second, onExit: exitKeep, onDead: loader.OnDeadHold, jsonLogs: true, workers: 3, sourcePorts: [2]uint16{20000, 20003},
	}
	if d := cmp.Diff(want, o, cmp.AllowUnexported(attachOptions{})); d != "" || errText != "" {
		t.Errorf("%s, -want +got:\n%s", errText, d)
	}
	o, errText = parseAttach(t, "eth0 --routes r.yaml")
	if errText != "" || o.name != loader.DefaultName || o.mode != loader.ModeTC || o.drainTimeout != 10*time.Second || o.order != loader.OrderFirst || o.onDead != loader.OnDeadPass || o.onExit != exitDetach || o.workers < 1 || o.workers > 8 || o.sourcePorts != [2]uint16{10000, 29999} {
		t.Errorf("the defaults: %+v, %s", o, errText)
	}
}

func TestAttachRefuses(t *testing.T) {
	for line, want := range map[string]string{
		"":                                           "attach needs at least one interface",
		"eth0":                                       "attach needs --routes FILE",
		"eth0 eth0=tc --routes r":                    "interface eth0 is named twice",
		"=tc --routes r":                             `"=tc" names no interface`,
		"eth0=xdpdrv --routes r":                     `eth0=xdpdrv: no mode "xdpdrv": use tc, xdp or xdp-generic`,
		"eth0= --routes r":                           `eth0=: no mode ""`,
		"eth0 --mode fast":                           `--mode fast: no mode "fast"`,
		"eth0 --routes r --on-exit stay":             "--on-exit \"stay\": use detach or keep",
		"eth0 --routes r --on-dead x":                `--on-dead "x": use pass, reset or hold`,
		"eth0 --watch":                               "--watch is not supported yet",
		"eth0 --metrics :9":                          "--metrics is not supported yet",
		"eth0 --cookie-key k":                        "--cookie-key is not supported yet",
		"eth0 --access-log -":                        "--access-log is not supported yet",
		"eth0 --drain-delay 1s":                      "--drain-delay is not supported yet",
		"eth0 --routes r --order middle":             `--order "middle"`,
		"eth0 --routes r --name A/b":                 "--name: instance name",
		"eth0 --routes r --dead-after 1ms":           "--dead-after 1ms: use 2s or more",
		"eth0 --routes r --dead-after 9":             "invalid value",
		"eth0 --routes r --log-format xml":           `--log-format "xml"`,
		"eth0 --routes r --workers 65":               "--workers 65: use 1 to 64",
		"eth0 --routes r --api-owner no-such-user":   `--api-owner "no-such-user": user: unknown user no-such-user: use USER or USER:GROUP`,
		"eth0 --routes r --api-owner root:":          `--api-owner "root:": group: unknown group`,
		"eth0 --routes r --api-owner :root":          `--api-owner ":root": user: unknown user`,
		"eth0 --routes r --api-owner root:nosuchgrp": `unknown group nosuchgrp`,
		"eth0 --routes r --api-owner 4294967295":     `unknown user`,
		"eth0 --routes r --source-ports x":           `--source-ports "x": use FIRST-LAST`,
		"eth0 --routes r --source-ports 20000":       `--source-ports "20000": use FIRST-LAST`,
		"eth0 --routes r --source-ports 20003-20000": `--source-ports "20003-20000": use FIRST-LAST`,
		"eth0 --routes r --source-ports 0-9":         `--source-ports "0-9": use FIRST-LAST`,
		"eth0 --routes r --source-ports 1-2-3":       `--source-ports "1-2-3": use FIRST-LAST`,
		"eth0 --routes r --source-ports 1-65536":     `--source-ports "1-65536": use FIRST-LAST`,
	} {
		if _, errText := parseAttach(t, line); !strings.Contains(errText, want) {
			t.Errorf("%s: %q, want %q", line, errText, want)
		}
	}
}

func TestAPIOwner(t *testing.T) {
	for word, want := range map[string]api.Owner{
		"root": {UID: 0, GID: -1}, "root:root": {}, "12345": {UID: 12345, GID: -1}, "daemon:54321": {UID: 1, GID: 54321},
	} {
		o, errText := parseAttach(t, "eth0 --routes r --api-owner "+word)
		if errText != "" || o.socketOwner == nil || *o.socketOwner != want {
			t.Errorf("%s: %+v, %s", word, o.socketOwner, errText)
		}
	}
}

func TestExitCodes(t *testing.T) {
	for line, want := range map[string]int{
		"attach": exitUsage, "attach eth0 --nonsense": exitUsage, "nonsense": exitUsage, "--nonsense": exitUsage,
		"attach lo --routes /nonexistent": exitFailed, "attach lo --routes /nonexistent --api-owner no-such-user": exitUsage, "doctor lo": exitFailed, "doctor -o xml": exitUsage, "doctor --nonsense": exitUsage, "detach": exitUsage, "detach lo --all": exitUsage,
		"status -o xml": exitUsage, "status x": exitUsage, "flows -o xml": exitUsage, "status --name A": exitUsage,
		"status --api /nonexistent": exitFailed, "flows --api /nonexistent": exitFailed, "config --api /nonexistent": exitFailed,
		"version": 0, "version x": exitUsage, "": 0, "help": 0,
	} {
		app := newApp()
		app.Writer, app.ErrWriter = &bytes.Buffer{}, &bytes.Buffer{}
		args := append([]string{"snilb"}, strings.Fields(line)...)
		if got := exitCode(app, app.Run(flagsAnywhere(app, args))); got != want {
			t.Errorf("snilb %s: %d, want %d", line, got, want)
		}
	}
}
