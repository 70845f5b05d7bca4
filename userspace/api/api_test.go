// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// serve starts a server and returns its socket and what ends it.
func serve(t *testing.T, h Handlers) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "x.sock")
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, h, slog.New(slog.DiscardHandler)) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		ended <- nil // a second call finds it ended
	}
	t.Cleanup(stop)
	return path, stop
}

func flowsOf(values ...any) func() iter.Seq[any] {
	return func() iter.Seq[any] { return slices.Values(values) }
}

func collect(t *testing.T, c *Client) string {
	t.Helper()
	var all []string
	err := c.Flows(t.Context(), func(raw json.RawMessage) error {
		all = append(all, string(raw))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

func TestObjects(t *testing.T) {
	detached, reloads, refused := 0, 0, error(nil)
	path, _ := serve(t, Handlers{
		Status: func() (any, error) { return map[string]int{"flows": 3}, nil },
		Config: func() (any, error) { return nil, errors.New("no file") },
		Flows:  flowsOf(1, "two"),
		Detach: func() { detached++ },
		Reload: func() error { reloads++; return refused },
	})
	c := NewClient("x", path)
	raw, err := c.Status(t.Context())
	if err != nil || strings.TrimSpace(string(raw)) != `{"flows":3}` {
		t.Errorf("status: %s, %v", raw, err)
	}
	if _, err := c.Config(t.Context()); err == nil || err.Error() != "daemon x: no file" {
		t.Errorf("config: %v", err)
	}
	if err := c.Detach(t.Context()); err != nil || detached != 1 {
		t.Errorf("detach: %v, called %d times", err, detached)
	}
	if err := c.Reload(t.Context()); err != nil || reloads != 1 {
		t.Errorf("reload: %v, called %d times", err, reloads)
	}
	refused = errors.New("r.yaml:1:2: one\nr.yaml:3:4: two")
	var refusal *Refusal
	if err := c.Reload(t.Context()); !errors.As(err, &refusal) || err.Error() != refused.Error() {
		t.Errorf("refused reload: %v", err)
	}
	if got := collect(t, c); got != `1 "two"` {
		t.Errorf("flows: %s", got)
	}
	enough := errors.New("enough")
	if err := c.Flows(t.Context(), func(json.RawMessage) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("flows, ended by the reader: %v", err)
	}
}

func TestArray(t *testing.T) {
	for want, values := range map[string][]any{"[]": nil, "[1]": {1}, `[1,"two"]`: {1, "two"}} {
		path, _ := serve(t, Handlers{Flows: flowsOf(values...)})
		client := &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			},
			DisableKeepAlives: true,
		}}
		response, err := client.Get("http://x/v1/flows")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		if err := errors.Join(err, response.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if got := strings.ReplaceAll(string(body), "\n", ""); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// TestSlowReader ends the server while it answers somebody who does not read: nothing is listed any more when it has ended.
func TestSlowReader(t *testing.T) {
	begun, listing := make(chan struct{}), atomic.Bool{}
	path, stop := serve(t, Handlers{Flows: func() iter.Seq[any] {
		return func(yield func(any) bool) {
			listing.Store(true)
			close(begun)
			for yield(strings.Repeat("x", 1000)) {
			}
			time.Sleep(50 * time.Millisecond) // as if there were more to do
			listing.Store(false)
		}
	}})
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /v1/flows HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-begun
	stop()
	if listing.Load() {
		t.Error("flows are still listed when the server has ended")
	}
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	c := NewClient("x", path)
	want := "no daemon x here: is it running? (socket " + path + ")"
	_, err := c.Status(t.Context())
	if !errors.Is(err, ErrNoDaemon) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	abandon(t, path)
	if err := c.Detach(t.Context()); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("a dead daemon's socket: %v", err)
	}
}

// abandon leaves a socket that nobody listens on.
func abandon(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestSilentDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // the test is over
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = NewClient("x", path).Status(ctx)
	if err == nil || !strings.Contains(err.Error(), "daemon x does not answer") {
		t.Error(err)
	}
}

func TestSocket(t *testing.T) {
	path, stop := serve(t, Handlers{})
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if _, err := Listen(path, nil); err == nil || !strings.Contains(err.Error(), "another process listens on "+path) {
		t.Errorf("a second daemon: %v", err)
	}
	stop()
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	abandon(t, path)
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatalf("a dead daemon's socket is in the way: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, nil); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file: %v", err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test must run here, and needs root")
		}
		t.Skip("only root gives files away")
	}
}

func TestOwner(t *testing.T) {
	needRoot(t)
	for _, c := range []struct {
		owner Owner
		gid   int
		mode  os.FileMode
	}{
		{Owner{UID: 12345, GID: -1}, os.Getegid(), 0o600},
		{Owner{UID: 12345, GID: 54321}, 54321, 0o660},
	} {
		path := filepath.Join(t.TempDir(), "x.sock")
		l, err := Listen(path, &c.owner)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		has := info.Sys().(*syscall.Stat_t)
		if int(has.Uid) != c.owner.UID || int(has.Gid) != c.gid || info.Mode().Perm() != c.mode {
			t.Errorf("%+v: owner %d:%d, mode %v, want mode %v", c.owner, has.Uid, has.Gid, info.Mode(), c.mode)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A socket is closed to others before anything is done to it, whatever the umask is.
func TestBind(t *testing.T) {
	before := syscall.Umask(0)
	defer syscall.Umask(before)
	path := filepath.Join(t.TempDir(), "x.sock")
	l, err := bind(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // the test is over
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// Who owns the directory puts something else in the place of the socket, to be given what it names.
func TestOwnerSwapped(t *testing.T) {
	needRoot(t)
	for name, put := range map[string]func(path, victim string) error{
		"symbolic link": func(path, victim string) error { return os.Symlink(victim, path) },
		"hard link":     func(path, victim string) error { return os.Link(victim, path) },
		"socket": func(path, victim string) error {
			l, err := bind(victim + ".sock")
			if err != nil {
				return err
			}
			return errors.Join(os.Remove(victim), os.Rename(victim+".sock", victim), os.Link(victim, path), l.Close())
		},
		"nothing": func(string, string) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, victim := filepath.Join(dir, "x.sock"), filepath.Join(dir, "victim")
			if err := errors.Join(os.WriteFile(victim, nil, 0o640), put(path, victim)); err != nil {
				t.Fatal(err)
			}
			was, err := os.Stat(victim)
			if err != nil {
				t.Fatal(err)
			}
			if err := give(path, &Owner{UID: 12345, GID: 54321}); err == nil {
				t.Error("it was given away")
			}
			is, err := os.Stat(victim)
			if err != nil {
				t.Fatal(err)
			}
			if has := is.Sys().(*syscall.Stat_t); has.Uid != uint32(os.Geteuid()) || is.Mode() != was.Mode() {
				t.Errorf("the victim is user %d's, and has mode %v, before %v", has.Uid, is.Mode(), was.Mode())
			}
		})
	}
}
