//! The images of programs that people run: each is the Debian base and one layer with
//! a program's packages, configured as its official image is.

use super::deb::{self, Package};
use super::layer::Layer;
use super::layout::{self, Compression, Config};
use super::{PATH, accounts, debian_base};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// What a layer holds beside packages: maintainer scripts do not run, so what they
/// would do is said here.
type Finish = fn(&mut Layer) -> Result<()>;

struct Workload {
    /// `debian-NAME:bookworm`.
    name: &'static str,
    /// The environment variable that tells the tests where the image is.
    variable: &'static str,
    /// All that the layer holds, not what apt would add to it: what only maintainer
    /// scripts or other uses need is left out.
    packages: &'static [&'static str],
    config: Config<'static>,
    /// The user that a server becomes, as a line of `/etc/passwd`.
    user: Option<&'static str>,
    finish: Finish,
}

/// The id of the servers' users, in the official images too.
const SERVER: u64 = 999;

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "python3",
        variable: "VM_RUN_TEST_PYTHON3",
        packages: &[
            "libexpat1",
            "libffi8",
            "libpython3.11-minimal",
            "libpython3.11-stdlib",
            "libreadline8",
            "libsqlite3-0",
            "libssl3",
            "python3-markupsafe",
            "python3-minimal",
            "python3.11-minimal",
        ],
        config: Config {
            env: &[PATH, "LANG=C.UTF-8"],
            cmd: &["python3"],
            ..Config::EMPTY
        },
        user: None,
        finish: |_| Ok(()),
    },
    Workload {
        name: "node",
        variable: "VM_RUN_TEST_NODE",
        packages: &[
            "libbrotli1",
            "libc-ares2",
            "libicu72",
            "libnghttp2-14",
            "libnode108",
            "libssl3",
            "libstdc++6",
            "libuv1",
            "node-acorn",
            "node-busboy",
            "node-cjs-module-lexer",
            "node-undici",
            "node-xtend",
            "nodejs",
        ],
        config: Config {
            env: &[PATH, "NODE_VERSION=18"],
            entrypoint: &["docker-entrypoint.sh"],
            cmd: &["node"],
            ..Config::EMPTY
        },
        user: None,
        finish: |layer| {
            layer.directory("usr/local/bin", 0o755, 0)?;
            layer.file("usr/local/bin/docker-entrypoint.sh", 0o755, NODE_ENTRYPOINT)
        },
    },
    Workload {
        name: "redis",
        variable: "VM_RUN_TEST_REDIS",
        packages: &[
            "libatomic1",
            "libjemalloc2",
            "liblzf1",
            "libssl3",
            "libstdc++6",
            "redis-server",
            "redis-tools",
        ],
        config: Config {
            env: &[PATH, "REDIS_VERSION=7.0"],
            entrypoint: &["docker-entrypoint.sh"],
            cmd: &["redis-server"],
            working_dir: "/data",
            exposed_ports: &["6379/tcp"],
            volumes: &["/data"],
            ..Config::EMPTY
        },
        user: Some("redis:x:999:999::/data:/bin/sh\n"),
        finish: |layer| {
            layer.directory("data", 0o755, SERVER)?;
            layer.directory("usr/local/bin", 0o755, 0)?;
            layer.file(
                "usr/local/bin/docker-entrypoint.sh",
                0o755,
                REDIS_ENTRYPOINT,
            )
        },
    },
    Workload {
        name: "nginx",
        variable: "VM_RUN_TEST_NGINX",
        packages: &["libssl3", "media-types", "nginx", "nginx-common"],
        config: Config {
            env: &[PATH],
            entrypoint: &["/docker-entrypoint.sh"],
            cmd: &["nginx", "-g", "daemon off;"],
            stop_signal: "SIGQUIT",
            exposed_ports: &["80/tcp"],
            ..Config::EMPTY
        },
        user: None,
        finish: |layer| {
            layer.file("docker-entrypoint.sh", 0o755, NGINX_ENTRYPOINT)?;
            layer.symlink(
                "etc/nginx/sites-enabled/default",
                "/etc/nginx/sites-available/default",
            )?;
            layer.directory("var/www", 0o755, 0)?;
            layer.directory("var/www/html", 0o755, 0)?;
            layer.file("var/www/html/index.html", 0o644, b"served by nginx\n")?;
            layer.symlink("var/log/nginx/access.log", "/dev/stdout")?;
            layer.symlink("var/log/nginx/error.log", "/dev/stderr")
        },
    },
    Workload {
        name: "postgres",
        variable: "VM_RUN_TEST_POSTGRES",
        // Without LLVM, which only the just-in-time compiler needs: it is a module.
        packages: &[
            "libcom-err2",
            "libedit2",
            "libffi8",
            "libbsd0",
            "libgnutls30",
            "libgssapi-krb5-2",
            "libhogweed6",
            "libicu72",
            "libidn2-0",
            "libk5crypto3",
            "libkeyutils1",
            "libkrb5-3",
            "libkrb5support0",
            "libldap-2.5-0",
            "libnettle8",
            "libp11-kit0",
            "libpq5",
            "libreadline8",
            "libsasl2-2",
            "libssl3",
            "libstdc++6",
            "libtasn1-6",
            "libunistring2",
            "libxml2",
            "libxslt1.1",
            "postgresql-15",
            "postgresql-client-15",
            "tzdata",
        ],
        config: Config {
            env: &[
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:\
                 /usr/lib/postgresql/15/bin",
                "LANG=C.UTF-8",
                "PG_MAJOR=15",
                "PGDATA=/var/lib/postgresql/data",
            ],
            entrypoint: &["docker-entrypoint.sh"],
            cmd: &["postgres"],
            stop_signal: "SIGINT",
            exposed_ports: &["5432/tcp"],
            volumes: &["/var/lib/postgresql/data"],
            ..Config::EMPTY
        },
        user: Some("postgres:x:999:999::/var/lib/postgresql:/bin/bash\n"),
        finish: |layer| {
            layer.directory("var/lib/postgresql/data", 0o700, SERVER)?;
            layer.directory("var/run/postgresql", 0o2775, SERVER)?;
            layer.directory("usr/local/bin", 0o755, 0)?;
            layer.file(
                "usr/local/bin/docker-entrypoint.sh",
                0o755,
                POSTGRES_ENTRYPOINT,
            )
        },
    },
    Workload {
        name: "sqlite",
        variable: "VM_RUN_TEST_SQLITE",
        packages: &["libreadline8", "libsqlite3-0", "sqlite3"],
        config: Config {
            env: &[PATH],
            cmd: &["sqlite3"],
            working_dir: "/data",
            ..Config::EMPTY
        },
        user: None,
        finish: |layer| layer.directory("data", 0o755, 0),
    },
    Workload {
        name: "gcc",
        variable: "VM_RUN_TEST_GCC",
        packages: &[
            "binutils",
            "binutils-common",
            "binutils-x86-64-linux-gnu",
            "cpp",
            "cpp-12",
            "gcc",
            "gcc-12",
            "libbinutils",
            "libc6-dev",
            "libcrypt-dev",
            "libctf-nobfd0",
            "libctf0",
            "libgcc-12-dev",
            "libisl23",
            "libjansson4",
            "libmpc3",
            "libmpfr6",
            "libgmp10",
            "libstdc++6",
            "linux-libc-dev",
        ],
        config: Config {
            env: &[PATH],
            cmd: &["bash"],
            ..Config::EMPTY
        },
        user: None,
        finish: |layer| layer.symlink("usr/bin/cc", "gcc"),
    },
    Workload {
        name: "git",
        variable: "VM_RUN_TEST_GIT",
        packages: &["git"],
        config: Config {
            env: &[PATH],
            entrypoint: &["git"],
            cmd: &["--help"],
            working_dir: "/git",
            volumes: &["/git"],
            ..Config::EMPTY
        },
        user: None,
        finish: |layer| layer.directory("git", 0o755, 0),
    },
    // No programs that people run in a container, but what measures those.
    Workload {
        name: "fio",
        variable: "VM_RUN_TEST_FIO",
        packages: &[
            "fio",
            "libaio1",
            "libargon2-1",
            "libblkid1",
            "libboost-iostreams1.74.0",
            "libboost-thread1.74.0",
            "libbz2-1.0",
            "libcom-err2",
            "libcryptsetup12",
            "libdaxctl1",
            "libdevmapper1.02.1",
            "libffi8",
            "libfmt9",
            "libgfapi0",
            "libgfrpc0",
            "libgfxdr0",
            "libglusterfs0",
            "libgmp10",
            "libgnutls30",
            "libgssapi-krb5-2",
            "libhogweed6",
            "libibverbs1",
            "libicu72",
            "libidn2-0",
            "libjson-c5",
            "libk5crypto3",
            "libkeyutils1",
            "libkmod2",
            "libkrb5-3",
            "libkrb5support0",
            "liblzma5",
            "libnbd0",
            "libndctl6",
            "libnettle8",
            "libnl-3-200",
            "libnl-route-3-200",
            "libnuma1",
            "libp11-kit0",
            "libpmem1",
            "libpmemblk1",
            "librados2",
            "librbd1",
            "librdmacm1",
            "libssl3",
            "libstdc++6",
            "libtasn1-6",
            "libtirpc3",
            "libudev1",
            "libunistring2",
            "libuuid1",
            "libxml2",
            "zlib1g",
        ],
        config: Config {
            env: &[PATH],
            cmd: &["fio"],
            ..Config::EMPTY
        },
        user: None,
        finish: |_| Ok(()),
    },
    Workload {
        name: "nettools",
        variable: "VM_RUN_TEST_NETTOOLS",
        packages: &[
            "curl",
            "iperf3",
            "libbrotli1",
            "libcom-err2",
            "libcurl4",
            "libffi8",
            "libgnutls30",
            "libgssapi-krb5-2",
            "libhogweed6",
            "libidn2-0",
            "libiperf0",
            "libk5crypto3",
            "libkeyutils1",
            "libkrb5-3",
            "libkrb5support0",
            "libldap-2.5-0",
            "libluajit-5.1-2",
            "libluajit-5.1-common",
            "libnettle8",
            "libnghttp2-14",
            "libp11-kit0",
            "libpsl5",
            "librtmp1",
            "libsasl2-2",
            "libsctp1",
            "libssh2-1",
            "libssl3",
            "libtasn1-6",
            "libunistring2",
            "wrk",
        ],
        config: Config {
            env: &[PATH],
            cmd: &["bash"],
            ..Config::EMPTY
        },
        user: None,
        finish: |_| Ok(()),
    },
];

/// Runs what is asked for without a script between.
const NODE_ENTRYPOINT: &[u8] = b"#!/bin/sh
set -e
if [ \"${1#-}\" != \"$1\" ]; then set -- node \"$@\"; fi
exec \"$@\"
";

/// The server is not root's; what root would have made in its directory becomes its own.
const REDIS_ENTRYPOINT: &[u8] = b"#!/bin/sh
set -e
if [ \"${1#-}\" != \"$1\" ]; then set -- redis-server \"$@\"; fi
if [ \"$1\" = redis-server ] && [ \"$(id -u)\" = 0 ]; then
    find . ! -user redis -exec chown redis {} +
    exec setpriv --reuid=redis --regid=redis --clear-groups \"$@\"
fi
exec \"$@\"
";

const NGINX_ENTRYPOINT: &[u8] = b"#!/bin/sh
set -e
exec \"$@\"
";

/// The first start makes the cluster, in the container.
const POSTGRES_ENTRYPOINT: &[u8] = b"#!/bin/sh
set -e
if [ \"$1\" = postgres ] && [ \"$(id -u)\" = 0 ]; then
    chown postgres \"$PGDATA\" /var/run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --clear-groups \"$0\" \"$@\"
fi
if [ \"$1\" = postgres ] && [ ! -s \"$PGDATA/PG_VERSION\" ]; then
    initdb --auth-local=trust --no-locale --encoding=UTF8
    echo \"listen_addresses = '*'\" >> \"$PGDATA/postgresql.conf\"
fi
exec \"$@\"
";

/// The images of all programs, each with the variable that tells the tests of it.
pub fn ensure_all() -> Result<Vec<(&'static str, PathBuf)>> {
    let mut names: Vec<&str> = super::DEBIAN_BASE.to_vec();
    names.extend(WORKLOADS.iter().flat_map(|workload| workload.packages));
    // Asked once for all: each question takes apt seconds.
    let all = deb::closure(&names)?;
    let base = deb::closure(super::DEBIAN_BASE)?;
    WORKLOADS
        .iter()
        .map(|workload| Ok((workload.variable, ensure(workload, &base, &all)?)))
        .collect()
}

fn ensure(workload: &Workload, base: &[Package], all: &[Package]) -> Result<PathBuf> {
    let mut packages = base.to_vec();
    for name in workload.packages {
        let found = all.iter().find(|package| package.name() == *name);
        let package = found.with_context(|| format!("apt names no package {name}"))?;
        if !base.iter().any(|package| package.name() == *name) {
            packages.push(package.clone());
        }
    }
    super::ensure(&format!("debian-{}", workload.name), &packages, |target| {
        let files = deb::download(&packages)?;
        let (lower, upper) = files.split_at(base.len());
        let mut layer = Layer::new();
        for package in upper {
            layer.package(package)?;
        }
        (workload.finish)(&mut layer)?;
        if let Some(user) = workload.user {
            let name = user.split(':').next().unwrap_or_default();
            let group = format!("{name}:x:{SERVER}:\n");
            for (kind, line) in [("passwd", user), ("group", group.as_str())] {
                let mut all = accounts(lower, kind)?;
                all.extend_from_slice(line.as_bytes());
                layer.file(&format!("etc/{kind}"), 0o644, &all)?;
            }
        }
        let layers = vec![
            (debian_base(lower)?, Compression::Gzip),
            (layer.finish()?, Compression::Zstd),
        ];
        let name = format!("debian-{}:bookworm", workload.name);
        layout::write_oci(target, &name, &workload.config, layers)
    })
    .with_context(|| format!("the image of {}", workload.name))
}
