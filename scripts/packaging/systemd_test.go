// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"snilb/scripts/testbed"
)

const patience = 30 * time.Second

// service is snilb@NAME under a systemd of its own, in the bed's load balancer.
type service struct {
	t       *testing.T
	bed     *testbed.Bed
	name    string
	work    string // see systemd.sh
	manager int    // the pid of systemd
	keeps   bool   // --on-exit keep is supported
	log     string // what the daemon says
}

func (s *service) unit() string { return "snilb@" + s.name + ".service" }

// bare are what every unit depends on, empty.
var bare = []string{"sysinit", "basic", "shutdown", "network-online", "multi-user"}

func startService(t *testing.T, bed *testbed.Bed, routes string) *service {
	t.Helper()
	needTool(t, "unshare", "nsenter", "pgrep", "systemctl")
	_, err := os.Stat("/lib/systemd/systemd")
	need(t, "systemd", err)
	d := theDeb(t)
	s := &service{t: t, bed: bed, name: fmt.Sprintf("packaging-%d", os.Getpid()), work: t.TempDir()}
	write := func(name, text string) {
		path := filepath.Join(s.work, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(text), 0o644))
	}
	must(t, os.Mkdir(filepath.Join(s.work, "layers"), 0o755))
	mustRun(t, "cp", "-a", d.root, filepath.Join(s.work, "root"))
	s.keeps = canKeep(t, bed, d)
	options := "--api-owner 12345:54321"
	if !s.keeps {
		options += " --on-exit detach"
	}
	write("root/etc/snilb/"+s.name+".env", "SNILB_INTERFACES=\""+strings.Join(bed.Uplinks, " ")+"\"\nSNILB_OPTIONS=\""+options+"\"\n")
	write("root/etc/snilb/"+s.name+".yaml", routes)
	for _, target := range bare {
		write("units/"+target+".target", "[Unit]\nDefaultDependencies=no\n")
	}
	write("units/modprobe@.service", "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/true\n")
	write("units/test.target", "[Unit]\nDefaultDependencies=no\n")
	s.log = filepath.Join(s.work, "log")
	// The log is the file of a journal that there is not; the watchdog is quick.
	write("units/snilb@.service.d/test.conf", "[Service]\nStandardError=append:/tmp/log\nWatchdogSec=3s\n")

	group := "snilb-" + s.name
	cmd := bed.LB.Command(context.Background(), "unshare", "--mount", "bash", "systemd.sh", s.work, group, "outer")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := s.inside("cat", "/tmp/log")
			state, _ := s.inside("systemctl", "status", "--no-pager", s.unit())
			t.Logf("systemd.sh said:\n%s\nthe daemon said:\n%s\n%s", said.String(), text, state)
		}
		_ = cmd.Process.Kill() // and with it all processes of the namespace
		_ = cmd.Wait()
		removeGroup(t, group)
		if out, err := output(bed.LB.Command(context.Background(), d.snilb(), "detach", "--all", "--name", s.name)); err != nil {
			t.Errorf("%v %s", err, out)
		}
	})
	s.manager = s.waitManager(cmd.Process.Pid)
	s.wait("systemd", func() error {
		_, err := s.inside("systemctl", "is-active", "test.target")
		return err
	})
	return s
}

// canKeep reports whether the build has --on-exit keep, which the unit asks for.
func canKeep(t *testing.T, bed *testbed.Bed, d deb) bool {
	_, err := output(bed.LB.Command(t.Context(), d.snilb(), "attach", "nosuch0", "--on-exit", "keep", "--routes", filepath.Join(d.root, "etc/snilb/default.yaml")))
	return err != nil && !strings.Contains(err.Error(), "not supported yet")
}

// waitManager waits for the child that has become systemd.
func (s *service) waitManager(parent int) (pid int) {
	s.t.Helper()
	s.wait("process 1 of the namespace", func() error {
		out, err := output(exec.Command("pgrep", "-P", fmt.Sprint(parent), "-x", "systemd"))
		if err != nil {
			return err
		}
		_, err = fmt.Sscan(out, &pid)
		return err
	})
	return pid
}

// inside runs a command in systemd's namespaces.
func (s *service) inside(args ...string) (string, error) {
	words := []string{"-t", fmt.Sprint(s.manager), "-m", "-p", "-u", "-i", "-n", "-r", "-w", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	return output(exec.Command("nsenter", append(words, args...)...))
}

func (s *service) mustInside(args ...string) string {
	s.t.Helper()
	out, err := s.inside(args...)
	must(s.t, err)
	return out
}

func (s *service) show(property string) string {
	s.t.Helper()
	return s.mustInside("systemctl", "show", "--value", "-p", property, s.unit())
}

func (s *service) wait(what string, ok func() error) {
	s.t.Helper()
	for limit := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(limit) {
			s.t.Fatalf("no %s in %s: %v", what, patience, err)
		}
	}
}

// waitRestarts waits until the daemon runs, after so many restarts.
func (s *service) waitRestarts(n int) {
	s.t.Helper()
	s.wait(fmt.Sprintf("service that was restarted %d times", n), func() error {
		if now := s.show("NRestarts"); now != fmt.Sprint(n) {
			return errors.New("restarts: " + now)
		}
		if state := s.show("ActiveState"); state != "active" {
			return errors.New("state: " + state)
		}
		return nil
	})
}

func (s *service) kill(sig string) {
	s.t.Helper()
	s.mustInside("kill", "-"+sig, s.show("MainPID"))
}

// removeGroup removes the cgroups of a dead systemd.
func removeGroup(t *testing.T, group string) {
	const script = `mount -t cgroup2 cgroup2 "$1" && cd "$1" && for i in 1 2 3 4 5 6 7 8 9; do
		find "$2" -depth -type d -exec rmdir {} + 2>/dev/null && exit; sleep 0.2; done; exit 1`
	if _, err := output(exec.Command("unshare", "--mount", "sh", "-c", script, "sh", t.TempDir(), group)); err != nil {
		t.Error(err)
	}
}

// pins lists what an instance keeps in the kernel.
func pins(name string) (found []string) {
	_ = filepath.WalkDir("/sys/fs/bpf/snilb", func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.Contains(path, name) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// TestService runs the unit as it is installed, with all of its hardening, under a real systemd.
func TestService(t *testing.T) {
	bed := newBed(t)
	site := startSite(t, bed)
	s := startService(t, bed, routesOf(bed))

	s.mustInside("systemctl", "start", s.unit())
	s.waitRestarts(0)
	s.assertServes(site)
	s.assertConfined()
	s.assertQuiet()
	s.assertOwner()

	s.mustInside("systemctl", "reload", s.unit())
	routes := "/etc/snilb/" + s.name + ".yaml"
	s.mustInside("sh", "-c", "echo 'rutes: []' >>"+routes)
	if _, err := s.inside("systemctl", "reload", s.unit()); err == nil {
		t.Error("a reload of broken routes is said to have worked")
	}
	s.mustInside("sed", "-i", "/^rutes/d", routes)

	s.kill("KILL")
	s.waitRestarts(1)
	s.assertServes(site)

	s.kill("STOP") // the watchdog ends it
	s.waitRestarts(2)
	s.assertServes(site)

	// Detach ends the service as well: where it came back that would be within RestartSec=, 500 ms.
	s.mustInside("snilb", "detach", "--all", "--name", s.name)
	s.wait("end of the service", func() error {
		if state := s.show("ActiveState") + " " + s.show("SubState"); state != "inactive dead" {
			return errors.New("state: " + state)
		}
		return nil
	})
	if got := s.show("Result"); got != "success" {
		t.Errorf("after a detach the service's result is %s", got)
	}
	if left := pins(s.name); len(left) > 0 {
		t.Errorf("left behind by a detach: %q", left)
	}
	s.mustInside("systemctl", "start", s.unit())
	s.assertServes(site)

	s.mustInside("systemctl", "stop", s.unit())
	if got := s.show("Result"); got != "success" {
		t.Errorf("after a stop the service's result is %s", got)
	}
	if kept := len(pins(s.name)) > 0; kept != s.keeps {
		t.Errorf("after a stop there is state in the kernel: %t, want %t", kept, s.keeps)
	}
	s.mustInside("snilb", "detach", "--all", "--name", s.name)
	if left := pins(s.name); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// assertServes: the daemon says that it steers, and a client gets an answer of the backend.
func (s *service) assertServes(at *site) {
	s.t.Helper()
	if out, err := s.inside("snilb", "status", "--name", s.name); err != nil {
		s.t.Errorf("%v\n%s", err, out)
	}
	at.assertServed(s.t)
}

// assertQuiet: where all is well the daemon complains of nothing, least of all of its own unit.
func (s *service) assertQuiet() {
	s.t.Helper()
	if said := s.mustInside("cat", "/tmp/log"); strings.Contains(said, "WARN") || strings.Contains(said, "ERROR") {
		s.t.Errorf("the daemon complains:\n%s", said)
	}
}

// assertOwner: commands are the user's and the group's that the options name.
func (s *service) assertOwner() {
	s.t.Helper()
	socket := s.mustInside("sh", "-c", "stat -c '%u %g %a' /run/snilb/"+s.name+"@*.sock")
	if socket != "12345 54321 660" {
		s.t.Errorf("owner and mode of the socket: %s", socket)
	}
}

// assertConfined: the daemon has the rights that the unit gives it at most, and sees of the machine what it needs.
func (s *service) assertConfined() {
	s.t.Helper()
	status := s.mustInside("cat", "/proc/"+s.show("MainPID")+"/status")
	fields := make(map[string]string)
	for line := range strings.SplitSeq(status, "\n") {
		key, value, _ := strings.Cut(line, ":\t")
		fields[key] = value
	}
	var bounding uint64
	_, err := fmt.Sscanf(fields["CapBnd"], "%x", &bounding)
	must(s.t, err)
	const chown, netAdmin, netRaw, perfmon, bpf = 0, 12, 13, 38, 39
	if allowed := uint64(1<<chown | 1<<netAdmin | 1<<netRaw | 1<<perfmon | 1<<bpf); bounding&^allowed != 0 {
		s.t.Errorf("capabilities within %#x, want %#x", bounding, allowed)
	}
	for dir, writable := range map[string]bool{
		"/etc": false, "/usr": false, "/run": false, "/proc/sys/kernel": false, "/run/snilb": true, "/sys/fs/bpf": true, "/dev/net/tun": true,
	} {
		_, err := s.inside("nsenter", "-t", s.show("MainPID"), "-m", "-r", "test", "-w", dir)
		if (err == nil) != writable {
			s.t.Errorf("the daemon may write to %s: %t", dir, err == nil)
		}
	}
	if fields["NoNewPrivs"] != "1" || fields["Seccomp"] != "2" {
		s.t.Errorf("NoNewPrivs %s, Seccomp %s", fields["NoNewPrivs"], fields["Seccomp"])
	}
}
