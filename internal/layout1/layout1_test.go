package layout1

import (
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/maps"
)

func TestMain(m *testing.M) { testnet.Main(m) }

// The structures in Go are those that the program of layout 1 was compiled with.
func TestStructures(t *testing.T) {
	spec := Spec(t)
	for name, of := range map[string]reflect.Type{
		"config":   reflect.TypeFor[maps.Config1](),
		"live":     reflect.TypeFor[maps.Live1](),
		"listener": reflect.TypeFor[maps.Listener1](),
	} {
		var c *btf.Struct
		if err := spec.Types.TypeByName(name, &c); err != nil {
			t.Fatal(err)
		}
		if int(c.Size) != int(of.Size()) || len(c.Members) != of.NumField() {
			t.Errorf("%s: %d bytes, %d fields, want %d and %d", name, of.Size(), of.NumField(), c.Size, len(c.Members))
		}
		for _, m := range c.Members {
			field, ok := of.FieldByNameFunc(func(s string) bool { return strings.EqualFold(s, strings.ReplaceAll(m.Name, "_", "")) })
			if !ok || field.Offset != uintptr(m.Offset.Bytes()) {
				t.Errorf("%s.%s is at %d, want %d", name, m.Name, field.Offset, m.Offset.Bytes())
			}
		}
	}
}
