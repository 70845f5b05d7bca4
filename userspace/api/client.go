// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

// ErrNoDaemon says that nobody listens on the socket.
var ErrNoDaemon = errors.New("no daemon")

// Refusal is the error of a daemon that was asked for what it cannot do: its own words.
type Refusal struct{ Text string }

func (e *Refusal) Error() string { return e.Text }

// answerTimeout bounds a whole request, but for the list of flows and a reload.
const answerTimeout = 10 * time.Second

// Client talks to one daemon. It is safe for concurrent use.
type Client struct {
	name, socket string
	http         *http.Client
}

// NewClient returns a client for the daemon that listens on a socket. The name is
// for error messages.
func NewClient(name, socket string) *Client {
	dialer := &net.Dialer{Timeout: dialTimeout}
	return &Client{
		name:   name,
		socket: socket,
		http: &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dialer.DialContext(ctx, "unix", socket)
			},
			DisableKeepAlives: true, // a command asks once
		}},
	}
}

// Status returns the daemon's status. Like every method it returns an error that
// is ErrNoDaemon if there is none.
func (c *Client) Status(ctx context.Context) (json.RawMessage, error) {
	return c.object(ctx, answerTimeout, http.MethodGet, pathStatus)
}

// Config returns the configuration that the daemon works by.
func (c *Client) Config(ctx context.Context) (json.RawMessage, error) {
	return c.object(ctx, answerTimeout, http.MethodGet, pathConfig)
}

// Detach asks the daemon to let go, and does not wait until it has.
func (c *Client) Detach(ctx context.Context) error {
	_, err := c.object(ctx, answerTimeout, http.MethodPost, pathDetach)
	return err
}

// Reload has the daemon read its routes again, and returns when they are in force. Its
// error is a Refusal if they are not, and nothing has changed.
func (c *Client) Reload(ctx context.Context) error {
	_, err := c.object(ctx, writeTimeout, http.MethodPost, pathReload)
	return err
}

// Flows calls each for every flow, until that returns an error.
func (c *Client) Flows(ctx context.Context, each func(json.RawMessage) error) (err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	body, err := c.ask(ctx, http.MethodGet, pathFlows)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	decoder := json.NewDecoder(body)
	for {
		var flow json.RawMessage
		err := decoder.Decode(&flow)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.explain(fmt.Errorf("read flows: %w", err))
		}
		if err := each(flow); err != nil {
			return err
		}
	}
}

func (c *Client) object(ctx context.Context, timeout time.Duration, method, path string) (_ json.RawMessage, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := c.ask(ctx, method, path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	raw, err := io.ReadAll(body)
	if err != nil {
		return nil, c.explain(err)
	}
	return raw, nil
}

func (c *Client) ask(ctx context.Context, method, path string) (io.ReadCloser, error) {
	// The host is only there because a URL has one.
	request, err := http.NewRequestWithContext(ctx, method, "http://snilb"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask daemon %s: %w", c.name, err)
	}
	request.Header.Set("Accept", linesType)
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.explain(err)
	}
	if response.StatusCode < 300 {
		return response.Body, nil
	}
	var f failure
	if json.NewDecoder(response.Body).Decode(&f) != nil || f.Error == "" {
		f.Error = response.Status + ": is it another version of snilb?"
	} else if response.StatusCode == http.StatusUnprocessableEntity {
		return nil, errors.Join(&Refusal{f.Error}, response.Body.Close())
	}
	return nil, errors.Join(fmt.Errorf("daemon %s: %s", c.name, f.Error), response.Body.Close())
}

// explain says what an error of the connection means.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return &noDaemon{c.name, c.socket}
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("socket %s of daemon %s: %w; run this as root", c.socket, c.name, fs.ErrPermission)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("daemon %s does not answer on %s: %w", c.name, c.socket, err)
	}
	return fmt.Errorf("ask daemon %s on %s: %w", c.name, c.socket, err)
}

// noDaemon is an ErrNoDaemon that says where.
type noDaemon struct{ name, socket string }

func (e *noDaemon) Error() string {
	return fmt.Sprintf("no daemon %s here: is it running? (socket %s)", e.name, e.socket)
}

func (e *noDaemon) Is(target error) bool { return target == ErrNoDaemon }
