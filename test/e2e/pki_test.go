package e2e

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pki is a certificate authority with its files in a directory.
type pki struct {
	dir    string
	ca     *x509.Certificate
	key    crypto.Signer
	serial int64
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	p := &pki{dir: t.TempDir()}
	p.ca, p.key = p.issue(t, "ca", &x509.Certificate{
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	})
	return p
}

// server and client issue a certificate and return the lines of an OpenVPN
// configuration that name it.
func (p *pki) server(t testing.TB, name string) string {
	t.Helper()
	return p.leaf(t, name, x509.ExtKeyUsageServerAuth)
}

func (p *pki) client(t testing.TB, name string) string {
	t.Helper()
	return p.leaf(t, name, x509.ExtKeyUsageClientAuth) + "remote-cert-tls server\n"
}

func (p *pki) leaf(t testing.TB, name string, usage x509.ExtKeyUsage) string {
	t.Helper()
	p.issue(t, name, &x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
	})
	return fmt.Sprintf("ca %s\ncert %s\nkey %s\n", p.file("ca.crt"), p.file(name+".crt"), p.file(name+".key"))
}

// issue completes a certificate, signs it and writes it and its key. The first
// one signs itself.
func (p *pki) issue(t testing.TB, name string, cert *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p.serial++
	cert.SerialNumber = big.NewInt(p.serial)
	cert.Subject = pkix.Name{CommonName: name}
	cert.NotBefore = time.Now().Add(-time.Hour)
	cert.NotAfter = time.Now().Add(24 * time.Hour)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	parent, signer := p.ca, p.key
	if parent == nil {
		parent, signer = cert, key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), signer)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	write := func(file, kind string, der []byte) {
		t.Helper()
		must(os.WriteFile(p.file(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	write(name+".crt", "CERTIFICATE", der)
	write(name+".key", "PRIVATE KEY", keyDER)
	issued, err := x509.ParseCertificate(der)
	must(err)
	return issued, key
}

func (p *pki) file(name string) string { return filepath.Join(p.dir, name) }
