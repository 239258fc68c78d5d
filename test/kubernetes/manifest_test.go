package kubernetes

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const manifests = "../../docs/kubernetes"

// manifest is what a file asks for.
type manifest struct {
	configs map[string]map[string]string // the data of config maps, by name
	pods    map[string]corev1.PodSpec    // of deployments and daemon sets, by name
}

// load decodes a file. Fields that the API does not have, and those given twice,
// fail the test.
func load(t testing.TB, name string) manifest {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(manifests, name))
	must(t, err)
	scheme := runtime.NewScheme()
	must(t, errors.Join(corev1.AddToScheme(scheme), appsv1.AddToScheme(scheme)))
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	m := manifest{map[string]map[string]string{}, map[string]corev1.PodSpec{}}
	documents := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(text)))
	defer documents.Close()
	buf := make([]byte, len(text))
	for {
		n, err := documents.Read(buf)
		if errors.Is(err, io.EOF) {
			return m
		}
		must(t, err)
		object, kind, err := decoder.Decode(buf[:n], nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		switch o := object.(type) {
		case *corev1.ConfigMap:
			m.configs[o.Name] = o.Data
		case *appsv1.Deployment:
			m.add(t, o.Name, o.Spec.Selector.MatchLabels, o.Spec.Template)
		case *appsv1.DaemonSet:
			m.add(t, o.Name, o.Spec.Selector.MatchLabels, o.Spec.Template)
		default:
			t.Fatalf("%s: %s: the test does not know what to do with it", name, kind)
		}
	}
}

// add takes a pod. The API server refuses a selector that does not choose it.
func (m manifest) add(t testing.TB, name string, selector map[string]string, pod corev1.PodTemplateSpec) {
	t.Helper()
	for key, value := range selector {
		if pod.Labels[key] != value {
			t.Errorf("%s: its pods have no label %s=%s", name, key, value)
		}
	}
	m.pods[name] = pod.Spec
}

// container is one of a pod's, whatever list it is in.
func container(t testing.TB, pod corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("there is no container %s", name)
	return corev1.Container{}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
