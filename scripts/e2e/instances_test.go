// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

// twoInstances has one instance on each of two uplinks, with the same backends, and a connection through each: by the
// address of the first uplink, and by the extra one.
func twoInstances(t *testing.T) (bed *testbed.Bed, ds [2]*daemon, conns [2]net.Conn) {
	t.Helper()
	bed = newBed(t, testbed.Options{Topology: testbed.TwoUplinks})
	startBackends(t, bed)
	must(t, bed.UseUplink(1))
	for i, dev := range []string{"eth0", "eth2"} {
		source := strings.Replace(siteRoutes(bed), "one: {", `one: {source: {ports: "5000-5999"}, `, 1)
		source = strings.Replace(source, "two: {", `two: {source: {ports: "5000-5999"}, `, 1)
		source = strings.Replace(source, "three: {", `three: {source: {ports: "5000-5999"}, `, 1)
		if i == 0 {
			source = siteRoutes(bed)
		}
		// Not the common mode: XDP has one place on the interface that both have towards the backends.
		d := start(t, bed, instanceName(), []string{dev + "=" + *mode}, source, append([]string{"--mode", "tc"}, atOnce...)...)
		d.waitReady()
		ds[i] = d
		conns[i] = dialTLS(t, bed, uplinkTarget(bed, i), "a.example.com")
	}
	for _, c := range conns {
		wantAll(t, []net.Conn{c}, "b1", "a.example.com")
	}
	return bed, ds, conns
}

func uplinkTarget(bed *testbed.Bed, uplink int) netip.AddrPort {
	if uplink == 0 {
		return vip(bed, false)
	}
	return netip.AddrPortFrom(bed.ExtraVIP4, 443)
}

// servedBy looks that an instance serves an old connection and new ones.
func wantServing(t *testing.T, bed *testbed.Bed, uplink int, d *daemon, c net.Conn) {
	t.Helper()
	wantAll(t, []net.Conn{c}, "b1", "a.example.com")
	for range 5 {
		got, err := goClient(t, bed, uplinkTarget(bed, uplink), "b.example.com")
		wantBody(t, got, err, "b2", "b.example.com")
	}
	own := 0
	for _, f := range d.flows() {
		if f.Client == c.LocalAddr().String() {
			own++
		}
	}
	if own != 1 {
		t.Errorf("instance %s has %d flows of its connection", d.name, own)
	}
}

// TestTwoInstances kills one of two instances, detaches what is left of it, starts it again and ends it: the other one
// serves all the time.
func TestTwoInstances(t *testing.T) {
	bed, ds, conns := twoInstances(t)
	wantServing(t, bed, 0, ds[0], conns[0])
	wantServing(t, bed, 1, ds[1], conns[1])
	ds[1].kill()
	wantServing(t, bed, 0, ds[0], conns[0])
	wantAll(t, conns[1:], "b1", "a.example.com")
	refused(t, bed, "eth1", ds[1].name+", whose daemon is dead", "--source-ports", "5500-6500")
	if _, err := ds[0].snilb("detach", "eth2"); err != nil {
		t.Errorf("detach eth2: %v", err)
	}
	if left := pinsOf(ds[1].name); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	wantServing(t, bed, 0, ds[0], conns[0])

	refused(t, bed, "eth2", "overlap with those of instance "+ds[0].name)
	wantServing(t, bed, 0, ds[0], conns[0])
	if _, err := ds[0].snilb("detach", "eth0", "--name", ds[0].name); err != nil {
		t.Errorf("detach eth0: %v", err)
	}
	<-ds[0].exited
	if ds[0].err != nil {
		t.Errorf("asked to detach it ended by %v", ds[0].err)
	}
	assertClean(t, bed, ds[0].name)
}

// refused starts an instance that must end, and say why.
func refused(t *testing.T, bed *testbed.Bed, dev, why string, args ...string) {
	t.Helper()
	d := start(t, bed, instanceName(), []string{dev}, siteRoutes(bed), args...)
	select {
	case <-d.exited:
	case <-time.After(readyTimeout):
		t.Fatal("it was let in")
	}
	if said := d.stderr.String(); d.err == nil || !strings.Contains(said, why) {
		t.Errorf("%v, no %q in what it said", d.err, why)
	}
}

// TestDetachAll detaches a living instance and what a dead one left.
func TestDetachAll(t *testing.T) {
	bed, ds, _ := twoInstances(t)
	ds[1].kill()
	out, err := ds[0].snilb("detach", "--all")
	must(t, err)
	for _, want := range []string{"detached instance " + ds[0].name, "removed what instance " + ds[1].name + " had left"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	<-ds[0].exited
	if ds[0].err != nil {
		t.Errorf("asked to detach it ended by %v", ds[0].err)
	}
	for _, d := range ds {
		assertClean(t, bed, d.name)
	}
	if out, err = ds[0].snilb("detach", "--all"); err != nil || out != "nothing to detach\n" {
		t.Errorf("once more: %q, %v", out, err)
	}
}

// TestDetachForce has a daemon that is stopped: detach says who has the interface, and kills it only when told to.
func TestDetachForce(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := start(t, bed, instanceName(), bed.Uplinks, siteRoutes(bed))
	d.waitReady()
	must(t, d.cmd.Process.Signal(syscall.SIGSTOP))
	_, err := d.snilb("detach", "eth0")
	if err == nil || !strings.Contains(err.Error(), "does not answer") || !strings.Contains(err.Error(), "--force kills it") {
		t.Errorf("detach of a stopped daemon: %v", err)
	}
	if d.hasExited() {
		t.Fatal("it is dead without --force")
	}
	if len(pinsOf(d.name)) == 0 {
		t.Error("what a living daemon has was removed")
	}
	out, err := d.snilb("detach", "eth0", "--force")
	must(t, err)
	if !strings.Contains(out, "removed what instance "+d.name+" had left") {
		t.Errorf("it said %q", out)
	}
	<-d.exited
	assertClean(t, bed, d.name)
}

// TestDetachForceDrains has a daemon that answers and lets its connections end, for longer than --force waits.
func TestDetachForceDrains(t *testing.T) {
	bed := newBed(t, testbed.Options{})
	startBackends(t, bed)
	d := start(t, bed, instanceName(), bed.Uplinks, siteRoutes(bed), "--drain-timeout", "1h")
	d.waitReady()
	wantAll(t, []net.Conn{dialTLS(t, bed, vip(bed, false), "a.example.com")}, "b1", "a.example.com")
	began := time.Now()
	_, err := d.snilb("detach", "--all", "--name", d.name, "--force")
	must(t, err)
	t.Logf("took %s", time.Since(began))
	<-d.exited
	if d.cmd.ProcessState.ExitCode() == 0 {
		t.Error("it ended by itself, which takes an hour")
	}
	assertClean(t, bed, d.name)
}
