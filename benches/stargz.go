// A peer: stargz-snapshotter 0.12, in the upstream's default configuration, for registries over plain HTTP. Debian's
// package of it has ctr-remote only, and the snapshotter as a library, which this serves on a unix socket.
// Built by image_bed.py: GO111MODULE=off GOPATH=/usr/share/gocode go build -o stargz-grpc stargz.go
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"net/http"
	"path/filepath"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/reference"
	"github.com/containerd/containerd/remotes/docker"
	"github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"google.golang.org/grpc"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	address, root := flag.String("address", "", ""), flag.String("root", "", "")
	flag.Parse()
	hosts := func(ref reference.Spec) ([]docker.RegistryHost, error) {
		return docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts),
			docker.WithClient(&http.Client{Transport: http.DefaultTransport}))(ref.Hostname())
	}
	lazy, err := fs.NewFilesystem(filepath.Join(*root, "stargz"), config.Config{},
		fs.WithGetSources(source.FromDefaultLabels(hosts)))
	check(err)
	snapshotter, err := snapshot.NewSnapshotter(context.Background(), filepath.Join(*root, "snapshotter"), lazy,
		snapshot.AsynchronousRemove)
	check(err)
	listener, err := net.Listen("unix", *address)
	check(err)
	server := grpc.NewServer()
	snapshots.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	check(server.Serve(listener))
}
