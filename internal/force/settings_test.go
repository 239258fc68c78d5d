package force

import (
	"errors"
	"testing"
)

func TestSupported(t *testing.T) {
	const linux513, linux514, linux515, linux60, linux61 = 5<<16 | 13<<8, 5<<16 | 14<<8, 5<<16 | 15<<8, 6 << 16, 6<<16 | 1<<8
	for _, test := range []struct {
		name           string
		settings       Settings
		kernel         uint32
		oldControllers bool
		want           string // "" for supported
	}{
		{"oldest", Settings{Reuseport: On}, linux514, false, ""},
		{"too old", Settings{Reuseport: On}, linux513 | 255, false, "set socket options in bind(2): not supported by this kernel: Linux 5.14 or later is needed"},
		{"SO_REUSEADDR", Settings{Reuseaddr: On}, linux61, false, ""},
		{"SO_REUSEADDR too old", Settings{Reuseaddr: Off}, linux60, false, "set SO_REUSEADDR in bind(2): not supported by this kernel: Linux 6.1 or later is needed"},
		{"net_cls", Settings{Reuseport: On}, linux515, true, ""},
		{"net_cls too old", Settings{Reuseport: On}, linux514, true, "cgroup programs beside the cgroup v1 controllers net_cls or net_prio: not supported by this kernel: unmount those, or use Linux 5.15 or later"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.settings.supported(test.kernel, test.oldControllers)
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (!errors.Is(err, ErrUnsupported) || err.Error() != test.want):
				t.Errorf("got  %v\nwant %s", err, test.want)
			}
		})
	}
}

func TestSettingsString(t *testing.T) {
	for _, test := range []struct {
		settings Settings
		want     string
	}{
		{Settings{}, "nothing"},
		{Settings{Reuseport: On}, "SO_REUSEPORT on"},
		{Settings{Reuseport: Off, Reuseaddr: On, Device: "eth0"}, "SO_BINDTODEVICE eth0, SO_REUSEADDR on, SO_REUSEPORT off"},
	} {
		t.Run(test.want, func(t *testing.T) {
			if got := test.settings.String(); got != test.want {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestSwitchText(t *testing.T) {
	for _, want := range []Switch{Leave, Off, On} {
		var got Switch
		if err := got.UnmarshalText([]byte(want.String())); err != nil || got != want {
			t.Errorf("%s: %v, error %v", want, got, err)
		}
	}
	for _, text := range []string{"", "ON", "1", "switch(3)"} {
		if err := new(Switch).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}
