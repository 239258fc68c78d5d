// Package kubernetes tries the manifests of docs/kubernetes without a Kubernetes:
// they are decoded strictly as the API's types, and their containers are made by
// hand, in namespaces, with the capabilities and mounts that they ask for.
//
// It is a module of its own, so that nobody who uses rpsel needs the API's types.
package kubernetes
