// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pathStatus = "/v1/status"
	pathFlows  = "/v1/flows"
	pathConfig = "/v1/config"
	pathDetach = "/v1/detach"
	pathReload = "/v1/reload"

	jsonType  = "application/json"
	linesType = "application/jsonl"

	// dialTimeout bounds the question whether somebody listens already.
	dialTimeout = time.Second
	// writeTimeout bounds an answer: a million flows to a slow terminal.
	writeTimeout = time.Minute
	// shutdownTimeout is how long Serve waits for answers that are under way.
	shutdownTimeout = 2 * time.Second
)

// Handlers answer the requests. All are required and are called concurrently.
type Handlers struct {
	Status func() (any, error)
	Flows  func() iter.Seq[any]
	Config func() (any, error)
	Detach func()
	Reload func() error // its error is for people, as it stands
}

// Owner is whom a socket belongs to.
type Owner struct {
	UID int
	GID int // its members may use it too; -1: nobody but the user
}

// Listen opens the socket, for its owner alone: this process' user if owner is nil. It
// takes the place of a socket that nobody listens on any more, but of nothing else.
func Listen(path string, owner *Owner) (net.Listener, error) {
	if err := refuseUsed(path); err != nil {
		return nil, err
	}
	// Nobody must find the socket before it has its owner.
	building := path + "~new"
	if err := os.Remove(building); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove a left socket: %w", err)
	}
	l, err := bind(building)
	if err != nil {
		return nil, fmt.Errorf("listen for commands: %w", err)
	}
	err = give(building, owner)
	if err == nil {
		err = os.Rename(building, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for commands: %w", err), l.Close(), os.Remove(building))
	}
	return &socket{Listener: l, path: path}, nil
}

// bind opens a socket that nobody but this process' user can use, from its first moment on: the kernel gives the path the
// mode that the socket has before.
func bind(path string) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if controlErr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); controlErr != nil {
			return controlErr
		}
		return err
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // it knows the first name only
	return l, nil
}

// give sets a socket's owner and mode, closed to all others at every moment. Who may write to the directory can put something
// else in the socket's place meanwhile: it must not be given away, nor what a link names.
func give(path string, owner *Owner) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) //nolint:errcheck // nothing was written
	var is unix.Stat_t
	if err := unix.Fstat(fd, &is); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if is.Mode&unix.S_IFMT != unix.S_IFSOCK || is.Uid != uint32(os.Geteuid()) || is.Nlink != 1 {
		return fmt.Errorf("%s is not the socket that was made there: choose a directory by --api that only root may write to", path)
	}
	// The user last: who does not own a file may change its mode only with a capability more.
	mode := os.FileMode(0o600)
	if owner != nil && owner.GID >= 0 {
		mode = 0o660
		if err := unix.Fchownat(fd, "", -1, owner.GID, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("give %s to group %d: %w", path, owner.GID, err)
		}
	}
	if err := os.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode); err != nil {
		return err
	}
	if owner != nil {
		if err := unix.Fchownat(fd, "", owner.UID, -1, unix.AT_EMPTY_PATH); err != nil {
			return fmt.Errorf("give %s to user %d: %w", path, owner.UID, err)
		}
	}
	return nil
}

// refuseUsed returns an error if what is at path is not ours to replace.
func refuseUsed(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the socket: %w", err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%s is no socket: move it away, or choose another path by --api", path)
	}
	c, err := net.DialTimeout("unix", path, dialTimeout)
	if err != nil {
		return nil // its daemon is dead
	}
	return errors.Join(fmt.Errorf("another process listens on %s: stop it, or choose another path by --api", path), c.Close())
}

// socket is a listener that removes its path.
type socket struct {
	net.Listener
	path string
}

func (s *socket) Close() error {
	err := s.Listener.Close()
	if removed := os.Remove(s.path); removed != nil && !errors.Is(removed, fs.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("remove the socket: %w", removed))
	}
	return err
}

// Serve answers on l until ctx ends, then closes it and returns nil. No handler runs any more then.
func Serve(ctx context.Context, l net.Listener, h Handlers, log *slog.Logger) error {
	var running sync.RWMutex
	answer := handler(h)
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			running.RLock()
			defer running.RUnlock()
			answer.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(l) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve commands: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	err := server.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close() // which does not wait: who is still answering cannot write, and ends
	}
	<-ended
	running.Lock() // for good
	if err != nil {
		return fmt.Errorf("stop serving commands: %w", err)
	}
	return nil
}

func handler(h Handlers) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) { answer(w, h.Status) })
	mux.HandleFunc("GET "+pathConfig, func(w http.ResponseWriter, _ *http.Request) { answer(w, h.Config) })
	mux.HandleFunc("GET "+pathFlows, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept"), linesType) {
			writeLines(w, h.Flows())
			return
		}
		writeArray(w, h.Flows())
	})
	mux.HandleFunc("POST "+pathDetach, func(w http.ResponseWriter, _ *http.Request) {
		h.Detach()
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("POST "+pathReload, func(w http.ResponseWriter, _ *http.Request) {
		if err := h.Reload(); err != nil {
			refuseWith(w, http.StatusUnprocessableEntity, err)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

func answer(w http.ResponseWriter, get func() (any, error)) {
	v, err := get()
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", jsonType)
	// An error means that the reader is gone.
	_ = json.NewEncoder(w).Encode(v)
}

// failure is the answer to a request that failed.
type failure struct {
	Error string `json:"error"`
}

func refuse(w http.ResponseWriter, err error) {
	refuseWith(w, http.StatusInternalServerError, err)
}

func refuseWith(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(failure{err.Error()})
}

func writeLines(w http.ResponseWriter, all iter.Seq[any]) {
	w.Header().Set("Content-Type", linesType)
	encoder := json.NewEncoder(w)
	for v := range all {
		if encoder.Encode(v) != nil {
			return // the reader is gone
		}
	}
}

func writeArray(w http.ResponseWriter, all iter.Seq[any]) {
	w.Header().Set("Content-Type", jsonType)
	encoder := json.NewEncoder(w)
	between := "["
	for v := range all {
		if _, err := w.Write([]byte(between)); err != nil || encoder.Encode(v) != nil {
			return
		}
		between = ","
	}
	if between == "[" {
		_, _ = w.Write([]byte("["))
	}
	_, _ = w.Write([]byte("]\n"))
}
