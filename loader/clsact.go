// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// clsactHook is a program attached as a direct-action filter, the only way before
// Linux 6.6. TCX_NEXT of our programs is TC_ACT_UNSPEC here: the next filter's turn.
type clsactHook struct {
	ns     *namespace
	filter *netlink.BpfFilter
	mark   string
}

const (
	clsactKind = "clsact"

	// Where our filters go on an interface without others: room in front and behind.
	clsactPriority = 256
	maxPriority    = 65535
)

var (
	ingress = uint32(netlink.HANDLE_MIN_INGRESS)
	egress  = uint32(netlink.HANDLE_MIN_EGRESS)
)

// filterName tells the filters of one instance from all others; FilterList shows it.
func filterName(instance string, role Role) string {
	return programOf[role] + " " + instance
}

func (i *Instance) attachClsact(a *attachment) (_ hook, err error) {
	h := &clsactHook{ns: i.ns, mark: clsactMark(i.dir, a.iface)}
	if err := h.addQdisc(a.ifindex); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeQdisc(i.ns, a.ifindex, h.mark))
		}
	}()
	if err := i.opts.before("filter " + string(a.role) + " " + a.iface); err != nil {
		return nil, err
	}
	priority, err := i.priority(a)
	if err != nil {
		return nil, err
	}
	h.filter = &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: a.ifindex,
			Parent:    ingress,
			Handle:    1,
			Protocol:  unix.ETH_P_ALL,
			Priority:  priority,
		},
		Fd:           a.prog.FD(),
		Name:         filterName(i.opts.Name, a.role),
		DirectAction: true,
	}
	if err := i.ns.FilterAdd(h.filter); err != nil {
		return nil, fmt.Errorf("add filter: %w", err)
	}
	return h, nil
}

// addQdisc makes the interface's clsact qdisc if it has none, and marks it as ours:
// only then may it be removed. The mark comes first, so that a crash in between
// leaves a mark too much, which removes only an empty qdisc, and not one too few.
func (h *clsactHook) addQdisc(ifindex int) error {
	made := true
	if err := os.Mkdir(h.mark, 0o700); errors.Is(err, fs.ErrExist) {
		made = false
	} else if err != nil {
		return fmt.Errorf("mark qdisc: %w", err)
	}
	err := h.ns.QdiscAdd(clsactQdisc(ifindex))
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EEXIST) {
		err = nil
	} else {
		err = fmt.Errorf("add clsact qdisc: %w; it needs CONFIG_NET_SCH_INGRESS", err)
	}
	if made {
		err = errors.Join(err, removeEmpty(h.mark))
	}
	return err
}

func clsactQdisc(ifindex int) *netlink.GenericQdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: ifindex,
			Handle:    netlink.MakeHandle(0xffff, 0),
			Parent:    netlink.HANDLE_CLSACT,
		},
		QdiscType: clsactKind,
	}
}

// priority finds a filter's place: two neighbouring ones are kept for our two
// programs of an interface.
func (i *Instance) priority(a *attachment) (uint16, error) {
	if other := i.neighbour(a); other != nil {
		if h, ok := other.hook.(*clsactHook); ok {
			if a.role == RoleClient {
				return h.filter.Priority - 1, nil
			}
			return h.filter.Priority + 1, nil
		}
	}
	filters, err := listFilters(i.ns, a.ifindex, ingress)
	if err != nil {
		return 0, err
	}
	var taken []int
	for _, f := range filters {
		taken = append(taken, int(f.Attrs().Priority))
	}
	base, honoured := choosePriority(taken, i.opts.Order)
	if base == 0 {
		return 0, errors.New("no two free filter priorities in a row: see `tc filter show dev " + a.iface + " ingress`")
	}
	if !honoured {
		i.log.Warn("other filters leave no room at that end: ours come between them", "interface", a.iface, "order", i.opts.Order)
	}
	if a.role == RoleBackend {
		base++
	}
	return uint16(base), nil
}

// choosePriority returns the first of two free priorities, and whether they are in
// front of (or behind) all taken ones. Returns 0 if there are none.
func choosePriority(taken []int, order Order) (base int, honoured bool) {
	if len(taken) == 0 {
		return clsactPriority, true
	}
	lowest, highest := slices.Min(taken), slices.Max(taken)
	if order == OrderFirst && lowest > 2 {
		return lowest - 2, true
	}
	if order == OrderLast && highest < maxPriority-1 {
		return highest + 1, true
	}
	for p := 1; p < maxPriority; p++ {
		if !slices.Contains(taken, p) && !slices.Contains(taken, p+1) {
			return p, false
		}
	}
	return 0, false
}

func (h *clsactHook) kind() string { return clsactKind }

func (h *clsactHook) detach() error {
	return errors.Join(removeFilter(h.ns, h.filter), removeQdisc(h.ns, h.filter.LinkIndex, h.mark))
}

// release: a filter stays by itself.
func (h *clsactHook) release() error { return nil }

func (h *clsactHook) alive() bool {
	filters, err := listFilters(h.ns, h.filter.LinkIndex, ingress)
	if err != nil {
		return !isGone(err) // see linkHook.alive
	}
	return slices.ContainsFunc(filters, func(f netlink.Filter) bool {
		b, ok := f.(*netlink.BpfFilter)
		return ok && b.Name == h.filter.Name
	})
}

func removeFilter(ns *namespace, f *netlink.BpfFilter) error {
	err := ns.FilterDel(f)
	// Without its qdisc or interface a filter is gone.
	if err != nil && !isGone(err) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove filter: %w", err)
	}
	return nil
}

// removeQdisc removes a clsact qdisc if we made it and nothing is left on it.
func removeQdisc(ns *namespace, ifindex int, mark string) error {
	if _, err := os.Stat(mark); err != nil {
		return nil
	}
	for _, parent := range []uint32{ingress, egress} {
		filters, err := listFilters(ns, ifindex, parent)
		if err != nil && !isGone(err) {
			return err
		}
		if len(filters) > 0 {
			return nil
		}
	}
	err := ns.QdiscDel(clsactQdisc(ifindex))
	if err != nil && !isGone(err) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove clsact qdisc: %w", err)
	}
	return removeEmpty(mark)
}

func listFilters(ns *namespace, ifindex int, parent uint32) ([]netlink.Filter, error) {
	device := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	filters, err := dump(func() ([]netlink.Filter, error) { return ns.FilterList(device, parent) })
	// An interface without the qdisc has none.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	return filters, nil
}

// instanceFilters lists our filters on an interface; of one instance, or of all if
// the name is empty.
func instanceFilters(ns *namespace, ifindex int, instance string) ([]*netlink.BpfFilter, error) {
	filters, err := listFilters(ns, ifindex, ingress)
	if err != nil {
		return nil, err
	}
	var ours []*netlink.BpfFilter
	for _, f := range filters {
		b, ok := f.(*netlink.BpfFilter)
		if !ok {
			continue
		}
		program, name, _ := strings.Cut(b.Name, " ")
		if isOurProgram(program) && validName.MatchString(name) && (instance == "" || name == instance) {
			ours = append(ours, b)
		}
	}
	return ours, nil
}

func isOurProgram(name string) bool {
	for _, program := range programOf {
		if name == program {
			return true
		}
	}
	return false
}
