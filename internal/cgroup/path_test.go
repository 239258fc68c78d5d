package cgroup

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/testnet"
)

func TestLocate(t *testing.T) {
	const (
		hybrid = "31 23 0:28 / /sys/fs/cgroup ro,relatime - tmpfs tmpfs ro,mode=755\n" +
			"32 31 0:29 / /sys/fs/cgroup/net_cls,net_prio rw,relatime - cgroup cgroup rw,net_cls,net_prio\n" +
			"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
		pure     = "35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
		readOnly = "35 24 0:30 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw\n"
		bound    = "35 24 0:30 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
		parent   = "35 24 0:30 /.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
		spaces   = "35 24 0:30 / /mnt/c\\040\\134g rw - cgroup2 cgroup2 rw\n"
	)
	for _, test := range []struct {
		name, cgroups, mounts string
		want                  []string
		err                   error
	}{
		{"hybrid", "4:memory:/x\n1:name=systemd:/y\n0::/\n", hybrid, []string{"/sys/fs/cgroup/unified"}, nil},
		{"hybrid below", "4:memory:/x\n0::/user.slice/a b\n", hybrid, []string{"/sys/fs/cgroup/unified/user.slice/a b"}, nil},
		{"pure", "0::/system.slice/sshd.service\n", pure, []string{"/sys/fs/cgroup/system.slice/sshd.service"}, nil},
		{"a name with colons", "0::/a:b::c\n", pure, []string{"/sys/fs/cgroup/a:b::c"}, nil},
		{"writable before read-only", "0::/x\n", readOnly + spaces, []string{"/mnt/c \\g/x", "/sys/fs/cgroup/x"}, nil},
		{"read-only", "0::/x\n", readOnly, []string{"/sys/fs/cgroup/x"}, nil},
		{"part of the tree", "0::/docker/abc/x\n", bound, []string{"/sys/fs/cgroup/x"}, nil},
		{"the part itself", "0::/docker/abc\n", bound, []string{"/sys/fs/cgroup"}, nil},
		{"beside the part", "0::/docker/abcd\n", bound, nil, ErrOutside},
		{"part and all", "0::/docker/abcd\n", bound + pure, []string{"/sys/fs/cgroup/docker/abcd"}, nil},
		{"outside of the namespace", "0::/../x\n", pure, nil, ErrOutside},
		{"mount from outside of the namespace", "0::/\n", parent, nil, ErrOutside},
		{"cgroup v1 only", "4:memory:/x\n", "", nil, ErrNoCgroup2},
		{"mounted elsewhere", "0::/\n", "31 23 0:28 / / rw - ext4 /dev/sda rw\n", nil, ErrNoCgroup2},
		{"nothing", "", "", nil, ErrNoCgroup2},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := locate(test.cgroups, test.mounts)
			if diff := cmp.Diff(test.want, got); diff != "" || !errors.Is(err, test.err) {
				t.Errorf("error %v, want %v; -want +got:\n%s", err, test.err, diff)
			}
		})
	}
}

func TestHighest(t *testing.T) {
	const (
		part   = "35 24 0:30 /docker/abc /part rw - cgroup2 cgroup2 rw\n"
		deeper = "35 24 0:30 /docker/abc/x /deeper rw - cgroup2 cgroup2 rw\n"
		all    = "35 24 0:30 / /all ro - cgroup2 cgroup2 ro\n"
		above  = "35 24 0:30 /../.. /above rw - cgroup2 cgroup2 rw\n"
		beside = "35 24 0:30 /../other /beside rw - cgroup2 cgroup2 rw\n"
		old    = "32 31 0:29 / /net_cls rw - cgroup cgroup rw,net_cls\n"
	)
	for _, test := range []struct {
		name, mounts string
		want         []string
		err          error
	}{
		{"all", old + all, []string{"/all"}, nil},
		{"all before a part", deeper + part + all, []string{"/all", "/part", "/deeper"}, nil},
		{"above the namespace", all + beside + above, []string{"/above", "/all"}, nil},
		{"a part", part, []string{"/part"}, nil},
		{"beside the namespace", beside, nil, ErrOutside},
		{"cgroup v1 only", old, nil, ErrNoCgroup2},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := highest("", test.mounts)
			if diff := cmp.Diff(test.want, got); diff != "" || !errors.Is(err, test.err) {
				t.Errorf("error %v, want %v; -want +got:\n%s", err, test.err, diff)
			}
		})
	}
}

// Programs on the root run for every cgroup, the caller's own too.
func TestRoot(t *testing.T) {
	testnet.Privileged(t)
	root, err := Root()
	must(t, err)
	own, err := Own()
	must(t, err)
	if below, ok := pathBelow(own, root); !ok || !isCgroup2(root+below) {
		t.Errorf("own cgroup %s is not below %s", own, root)
	}
	if isCgroup2(filepath.Dir(root)) {
		t.Errorf("%s is not the highest", root)
	}
}

func TestOldControllers(t *testing.T) {
	for _, test := range []struct {
		mounts string
		want   bool
	}{
		{"1 2 0:29 / /sys/fs/cgroup/net_cls,net_prio rw - cgroup cgroup rw,net_cls,net_prio\n", true},
		{"1 2 0:29 / /c rw - cgroup none rw,xattr,net_prio\n", true},
		{"1 2 0:29 / /net_cls rw - cgroup cgroup rw,cpu,cpuacct\n", false},
		{"1 2 0:29 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", false},
		{"", false},
	} {
		t.Run(test.mounts, func(t *testing.T) {
			if got := oldControllers(test.mounts); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}

func TestOutside(t *testing.T) {
	for _, test := range []struct {
		cgroups string
		want    bool
	}{
		{"0::/\n", false},
		{"4:memory:/../x\n0::/user.slice/..x\n", false},
		{"0::/../x\n", true},
		{"1:name=systemd:/\n0::/../../x\n", true},
		{"4:memory:/x\n", false},
	} {
		if got := outside(test.cgroups); got != test.want {
			t.Errorf("%q: %t", test.cgroups, got)
		}
	}
}
