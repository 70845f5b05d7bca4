// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDebContents compares the package with the list of what is in it, with modes and owners.
func TestDebContents(t *testing.T) {
	d := theDeb(t)
	var got []string
	for line := range strings.SplitSeq(mustRun(t, "dpkg-deb", "-c", d.file), "\n") {
		if f := strings.Fields(line); !strings.HasPrefix(f[0], "d") {
			got = append(got, f[0]+" "+f[1]+" "+f[5])
		} else if f[0] != "drwxr-xr-x" || f[1] != "root/root" {
			t.Errorf("directory %s", line)
		}
	}
	want := []string{
		"-rw-r--r-- root/root ./etc/snilb/default.env",
		"-rw-r--r-- root/root ./etc/snilb/default.yaml",
		"-rw-r--r-- root/root ./lib/systemd/system/snilb@.service",
		"-rwxr-xr-x root/root ./usr/bin/snilb",
		"-rw-r--r-- root/root ./usr/share/bash-completion/completions/snilb",
		"-rw-r--r-- root/root ./usr/share/doc/snilb/changelog.gz",
		"-rw-r--r-- root/root ./usr/share/doc/snilb/copyright",
		"-rw-r--r-- root/root ./usr/share/fish/vendor_completions.d/snilb.fish",
		"-rw-r--r-- root/root ./usr/share/man/man8/snilb.8.gz",
	}
	if !slices.Equal(got, want) {
		t.Errorf("contents:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestDebControl: no dependencies, files of the administrator are conffiles, and the version is the binary's own.
func TestDebControl(t *testing.T) {
	d := theDeb(t)
	field := func(name string) string { return mustRun(t, "dpkg-deb", "-f", d.file, name) }
	if depends := field("Depends"); depends != "" {
		t.Errorf("Depends: %s; the binary is static", depends)
	}
	version := field("Version")
	if said := mustRun(t, d.snilb(), "version"); !strings.HasPrefix(said, "snilb "+version+" ") {
		t.Errorf("version %s, and the binary says %s", version, said)
	}
	mustRun(t, "dpkg", "--validate-version", version)
	info := mustRun(t, "dpkg-deb", "-I", d.file, "conffiles")
	if info != "/etc/snilb/default.env\n/etc/snilb/default.yaml" {
		t.Errorf("conffiles:\n%s", info)
	}
	sums := exec.Command("md5sum", "--quiet", "-c", "-")
	sums.Dir, sums.Stdin = d.root, strings.NewReader(mustRun(t, "dpkg-deb", "-I", d.file, "md5sums")+"\n")
	if _, err := output(sums); err != nil {
		t.Error(err)
	}
}

// TestDebReproducible builds the package again from a copy of the tree elsewhere, as another kind of user: the same bytes.
func TestDebReproducible(t *testing.T) {
	d := theDeb(t)
	dir := t.TempDir()
	mustRun(t, "cp", "-a", "--no-target-directory", tree, filepath.Join(dir, "tree"))
	build := exec.Command("sh", "-c", `umask 077; exec "$0" "$1"`, filepath.Join(dir, "tree/scripts/deb/build.sh"), dir)
	build.Env = append(os.Environ(), "TZ=Asia/Tokyo", "LC_ALL=C", "GOFLAGS=-v")
	again, err := output(build)
	must(t, err)
	if filepath.Base(again) != filepath.Base(d.file) {
		t.Fatalf("%s and %s", again, d.file)
	}
	if _, err := output(exec.Command("cmp", d.file, again)); err != nil {
		t.Errorf("two builds differ: %v", err)
	}
}

// TestDebExample: the routes that come with the package are good, and the service's interfaces are not set, so that
// nobody's network is touched before somebody has said which.
func TestDebExample(t *testing.T) {
	d := theDeb(t)
	out := mustRun(t, d.snilb(), "check", "--strict", filepath.Join(d.root, "etc/snilb/default.yaml"))
	if !strings.HasPrefix(out, "ok: 1 listener, 2 pools,") {
		t.Errorf("check says %s", out)
	}
	env, err := os.ReadFile(filepath.Join(d.root, "etc/snilb/default.env"))
	must(t, err)
	settings := regexp.MustCompile(`(?m)^[^#\n]+$`).FindAllString(string(env), -1)
	if !slices.Equal(settings, []string{"SNILB_INTERFACES=", "SNILB_OPTIONS="}) {
		t.Errorf("default.env sets %q", settings)
	}
}

// TestManPage: troff understands every line, and nothing of the markup is left in what it prints.
func TestManPage(t *testing.T) {
	needTool(t, "man", "groff")
	d := theDeb(t)
	page := filepath.Join(d.root, "usr/share/man/man8/snilb.8.gz")
	cmd := exec.Command("man", "--warnings", "-l", page)
	cmd.Env = append(os.Environ(), "MANWIDTH=100", "LC_ALL=C.UTF-8", "MAN_KEEP_FORMATTING=", "MANPAGER=cat")
	var errOut strings.Builder
	cmd.Stderr = &errOut
	raw, err := cmd.Output()
	must(t, err)
	if errOut.Len() > 0 {
		t.Errorf("warnings:\n%s", errOut.String())
	}
	text := string(raw)
	words := strings.Join(strings.Fields(text), " ")
	for _, part := range []string{"SNILB(8)", "snilb attach IFACE[=MODE]...", "--drain-timeout DURATION", "snilb bench connections TARGET", "EXIT STATUS", "SIGNALS", "HUP has the routes file read again"} {
		if !strings.Contains(words, part) {
			t.Errorf("the page has no %q", part)
		}
	}
	if i := strings.IndexAny(text, "\\`"); i >= 0 {
		t.Errorf("markup in the page: %q", text[max(0, i-40):min(len(text), i+40)])
	}
}

// TestCompletion asks the shells what they offer.
func TestCompletion(t *testing.T) {
	d := theDeb(t)
	file := filepath.Join(t.TempDir(), "routes.yaml")
	must(t, os.WriteFile(file, nil, 0o644))
	shells := map[string]func(line string) []string{
		"bash": func(line string) []string {
			const ask = `source "$1"; COMP_WORDS=($2); [[ $2 != *' ' ]] || COMP_WORDS+=(''); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
				compopt() { :; } # bash has it for completions only
				$(complete -p snilb | sed 's/.*-F \([^ ]*\) .*/\1/') 2>&1; printf '%s\n' "${COMPREPLY[@]}"`
			return strings.Fields(mustRun(t, "bash", "--norc", "-uc", strings.Replace(ask, "$(complete", "eval $(complete", 1), "bash",
				filepath.Join(d.root, "usr/share/bash-completion/completions/snilb"), line))
		},
		"fish": func(line string) (words []string) {
			out := mustRun(t, "fish", "--no-config", "-c", "complete -e snilb; source $argv[1]; complete -C $argv[2]",
				filepath.Join(d.root, "usr/share/fish/vendor_completions.d/snilb.fish"), line)
			for l := range strings.SplitSeq(out, "\n") {
				word, _, _ := strings.Cut(l, "\t")
				words = append(words, word)
			}
			return words
		},
	}
	for _, c := range []struct {
		line string
		want []string // the first of them all, the rest among others
		all  bool
	}{
		{"snilb att", []string{"attach"}, true},
		{"snilb ", []string{"attach", "detach", "bench", "version"}, false},
		{"snilb attach --", []string{"--routes", "--on-exit", "--mode"}, false},
		{"snilb attach lo --rou", []string{"--routes"}, true},
		{"snilb attach l", []string{"lo"}, false},
		{"snilb attach --order ", []string{"first", "last"}, true},
		{"snilb bench bu", []string{"bulk"}, true},
		{"snilb bench bulk 192.0.2.1:443 --si", []string{"--size"}, true},
		{"snilb status -o js", []string{"json", "jsonl"}, true},
		{"snilb check " + filepath.Dir(file) + "/r", []string{file}, true},
		{"snilb attach lo --routes " + filepath.Dir(file) + "/r", []string{file}, true},
		{"snilb attach --work", nil, true}, // hidden
	} {
		for shell, ask := range shells {
			t.Run(shell+"/"+c.line, func(t *testing.T) {
				needTool(t, shell)
				got := slices.DeleteFunc(ask(c.line), func(s string) bool { return s == "" })
				slices.Sort(got)
				if c.all && !slices.Equal(got, c.want) {
					t.Errorf("offers %q, want %q", got, c.want)
				}
				for _, word := range c.want {
					if !slices.Contains(got, word) {
						t.Errorf("does not offer %s: %q", word, got)
					}
				}
			})
		}
	}
}
