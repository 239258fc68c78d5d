package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/maps"
	"github.com/rpsel/rpsel/sockets"
)

// allNetNS is what -N takes instead of a namespace where that makes sense.
const allNetNS = "all"

const allNetNSUsage = "network namespace: `NAME`, path or pid, or \"all\" (default: this one)"

// protocol is UDP for a port unless --proto says otherwise; 0 is both.
func (s *scope) protocol() sockets.Proto {
	if s.proto == 0 && s.port != 0 {
		return sockets.UDP
	}
	return s.proto
}

// String names what the scope is about, such as "udp port 1194".
func (s *scope) String() string {
	var words []string
	if s.protocol() != 0 {
		words = append(words, s.protocol().String())
	}
	if s.addr.IsValid() {
		words = append(words, s.addr.String())
	}
	if s.port != 0 {
		words = append(words, fmt.Sprintf("port %d", s.port))
	}
	if s.netns != "" {
		words = append(words, "in network namespace "+s.netns)
	}
	return strings.Join(words, " ")
}

// openNetNS opens the scope's network namespace.
func (s *scope) openNetNS() (*sockets.NetNS, error) {
	ns, err := sockets.OpenNetNS(s.netns)
	if errors.Is(err, sockets.ErrNoNetNS) {
		return nil, fmt.Errorf(`%w: give a pid, a path, or a name that "ip netns" lists`, err)
	}
	return ns, err
}

// cookie names the scope's network namespace.
func (s *scope) cookie() (uint64, error) {
	ns, err := s.openNetNS()
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.Cookie(), nil
}

// cookieOrAll is cookie, or 0 if the scope is all namespaces.
func (s *scope) cookieOrAll() (uint64, error) {
	if s.netns == allNetNS {
		return 0, nil
	}
	return s.cookie()
}

// keys lists the scope's groups that have state, in the namespace with this
// cookie or (0) in all, as they are shown: by port, protocol and address.
func (s *scope) keys(netns uint64) ([]loader.Key, error) {
	all, err := s.fs().Keys(netns)
	if err != nil {
		return nil, err
	}
	var keys []loader.Key
	for _, k := range all {
		if (s.port == 0 || k.Addr.Port() == s.port) &&
			(s.protocol() == 0 || k.Proto == s.protocol()) &&
			(!s.addr.IsValid() || k.Addr.Addr() == s.addr) {
			keys = append(keys, k)
		}
	}
	slices.SortStableFunc(keys, func(a, b loader.Key) int {
		return cmp.Or(
			cmp.Compare(a.NetNS, b.NetNS),
			cmp.Compare(a.Addr.Port(), b.Addr.Port()),
			cmp.Compare(a.Proto.String(), b.Proto.String()),
			a.Addr.Compare(b.Addr),
		)
	})
	return keys, nil
}

// open opens the scope's groups for who changes them: if the state of one cannot be
// used that is an error, and so it is that there is none if the scope names a port or
// an address. The caller closes them with closeAll.
func (s *scope) open() ([]*loader.Group, error) {
	groups, err := s.openUsable()
	if err == nil && len(s.damaged) > 0 {
		closeAll(groups)
		return nil, s.damaged[0].Err
	}
	if err == nil && len(groups) == 0 {
		err = s.missing()
	}
	return groups, err
}

// openReadable is open for who looks at what there is: a group whose state cannot be
// used is said, and does not hide the others. If there are no others it is an error.
func (s *scope) openReadable(e *env) ([]*loader.Group, error) {
	groups, err := s.openUsable()
	switch {
	case err != nil:
		return nil, err
	case len(groups) > 0:
		s.warnDamaged(e)
		return groups, nil
	case len(s.damaged) > 0:
		return nil, s.damaged[0].Err
	default:
		return nil, s.missing()
	}
}

// warnDamaged says which groups could not be read.
func (s *scope) warnDamaged(e *env) {
	for _, d := range s.damaged {
		e.warn("%s", errorText(d.Err, false))
	}
}

// missing is what is wrong with a scope that has no group, if it names a port or an
// address.
func (s *scope) missing() error {
	if s.port == 0 && !s.addr.IsValid() {
		return nil
	}
	return notFound(`%s: nothing is attached: "rpsel attach" makes a port sticky, "rpsel status" lists those that are`, s)
}

// openUsable opens the scope's groups whose state can be used, and puts the others
// into s.damaged. The caller closes the groups with closeAll.
func (s *scope) openUsable() ([]*loader.Group, error) {
	netns, err := s.cookieOrAll()
	if err != nil {
		return nil, err
	}
	keys, err := s.keys(netns)
	if err != nil {
		return nil, err
	}
	s.damaged = nil
	var groups []*loader.Group
	for _, k := range keys {
		g, err := s.fs().Open(k)
		switch {
		case errors.Is(err, loader.ErrNotAttached): // detached since it was listed
		case s.leaveOut(k, err):
		case err != nil:
			closeAll(groups)
			return nil, err
		default:
			groups = append(groups, g)
		}
	}
	return groups, nil
}

// leaveOut tells whether a group is to be left out since its state cannot be used, and
// notes it in s.damaged.
func (s *scope) leaveOut(k loader.Key, err error) bool {
	if !unusable(err) {
		return false
	}
	s.damaged = append(s.damaged, loader.Summary{Status: loader.Status{Key: k}, Err: err})
	return true
}

// unusable tells whether it is the state of a group that makes it unreadable.
func unusable(err error) bool {
	return errors.Is(err, loader.ErrOlder) || errors.Is(err, loader.ErrNewer) || errors.Is(err, loader.ErrIncompatible) || errors.Is(err, maps.ErrDamaged)
}

func closeAll(groups []*loader.Group) {
	for _, g := range groups {
		g.Close()
	}
}

// statuses reads the status of each group.
func statuses(groups []*loader.Group) ([]loader.Status, error) {
	list := make([]loader.Status, 0, len(groups))
	for _, g := range groups {
		status, err := g.Status()
		if err != nil {
			return nil, err
		}
		list = append(list, status)
	}
	return list, nil
}

// look reads how the scope's groups stand, for who looks at what there is. Those whose
// state cannot be used are in s.damaged; if there are no others that is an error.
func (s *scope) look() ([]loader.Status, error) {
	groups, err := s.openUsable()
	if err != nil {
		return nil, err
	}
	defer closeAll(groups)
	list := []loader.Status{}
	for _, g := range groups {
		status, err := g.Status()
		if s.leaveOut(g.Key(), err) { // since it was opened
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, status)
	}
	if len(list) == 0 && len(s.damaged) > 0 {
		return nil, s.damaged[0].Err
	}
	return list, nil
}

// needSlot refuses a slot that is in none of the groups, or that may mean
// several listeners.
func needSlot(slot int, list []loader.Status) error {
	if len(list) > 1 {
		var addrs []string
		for _, s := range list {
			addrs = append(addrs, s.Key.String())
		}
		return usageError("--slot %d: there are %d groups (%s): choose one with --port, --proto and --addr", slot, len(list), strings.Join(addrs, ", "))
	}
	if len(list) == 0 {
		return notFound(`slot %d: nothing is attached: "rpsel status" lists what is`, slot)
	}
	if _, ok := listenerIn(list[0], slot); !ok {
		return notFound(`%s: slot %d: no such listener: "rpsel status" lists them`, list[0].Key, slot)
	}
	return nil
}

// needPID refuses a process that has no listener in the groups.
func needPID(pid int, list []loader.Status) error {
	for _, s := range list {
		for _, l := range s.Listeners {
			if l.HeldBy(pid) {
				return nil
			}
		}
	}
	return notFound(`pid %d: has no listener here: "rpsel status" lists them`, pid)
}

// needOwn refuses a process that has several listeners of a group together with
// one that comes before it, as each worker of nginx has those of all: which of them
// it serves cannot be told.
func needOwn(pid int, list []loader.Status) error {
	for _, s := range list {
		shared, first := 0, 0
		for _, l := range s.Listeners {
			if l.State != "dead" && l.HeldBy(pid) && l.PID != pid {
				shared++
				first = l.PID
			}
		}
		if shared > 1 {
			return usageError("--pid %d: it has %d listeners together with pid %d, and which of them it serves cannot be told: choose one by --slot", pid, shared, first)
		}
	}
	return nil
}

func listenerIn(s loader.Status, slot int) (loader.Listener, bool) {
	for _, l := range s.Listeners {
		if l.Slot == slot {
			return l, true
		}
	}
	return loader.Listener{}, false
}

// groupJSON names a group in JSON.
type groupJSON struct {
	NetNS       uint64 `json:"netns"`
	NetNSCookie uint64 `json:"netns_cookie"`
	Proto       string `json:"proto"`
	Family      string `json:"family"`
	Addr        string `json:"addr"`
	Port        uint16 `json:"port"`
	V6Only      bool   `json:"v6only"`
	Device      string `json:"device"`
	UID         uint32 `json:"uid"`
}

func (s *scope) groupJSON(k loader.Key, inode uint64) groupJSON {
	family := "ipv6"
	if k.Addr.Addr().Is4() {
		family = "ipv4"
	}
	return groupJSON{
		NetNS: inode, NetNSCookie: k.NetNS, Proto: k.Proto.String(), Family: family,
		Addr: k.Addr.Addr().String(), Port: k.Addr.Port(), V6Only: k.V6Only, Device: s.deviceName(k.Device), UID: k.UID,
	}
}

// groupName names a group for people: its address and what is unusual.
func (s *scope) groupName(k loader.Key) string {
	device := k.Device
	k.Device = 0
	name := k.String()
	if device != 0 {
		name += " dev " + s.deviceName(device)
	}
	return name
}

// deviceName names an interface of the scope's namespace; "" is none.
func (s *scope) deviceName(index uint32) string {
	if index == 0 {
		return ""
	}
	name := fmt.Sprintf("if%d", index)
	if s.netns == allNetNS {
		return name
	}
	ns, err := s.openNetNS()
	if err != nil {
		return name
	}
	defer ns.Close()
	// A device that is gone has no name, and is no reason to fail.
	_ = ns.Do(func() error {
		device, err := net.InterfaceByIndex(int(index))
		if err == nil {
			name = device.Name
		}
		return err
	})
	return name
}

// socketName names a socket by who holds it.
func socketName(m sockets.Socket) string {
	if len(m.Holders) == 0 {
		return fmt.Sprintf("socket %d", m.Cookie)
	}
	return m.Holders[0].String()
}

// inodeOf finds what people know a group's network namespace by; 0 if the group
// is gone.
func (s *scope) inodeOf(k loader.Key) uint64 {
	groups, err := sockets.Find(sockets.Query{NetNS: k.NetNS, Proto: k.Proto, Port: k.Addr.Port(), Addr: k.Addr.Addr()})
	if err != nil || len(groups) == 0 {
		return 0
	}
	return uint64(groups[0].NetNSInode)
}
