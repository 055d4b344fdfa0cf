//! The recipes of docs/identity.md for programs that hold random numbers of their own.

use super::Workload;
use crate::support::{Call, field, variable};
use std::collections::BTreeSet;

/// Children of one template.
const CHILDREN: usize = 3;

impl Workload {
    /// A warm template of the image, `it`.
    fn warms(&self, line: &str, options: &[&str]) {
        let named = ["--name", "it", "--image", &self.image, "--warm", line];
        let patience = ["--warm-timeout", "900", "--hook-timeout", "300"];
        let args = [&named[..], &patience, options].concat();
        let built = Call::template_build_in(self.root(), &args).end();
        assert_eq!(built.status, 0, "{built}");
    }

    /// What each child says.
    fn children_say(&self) -> Vec<String> {
        let child = |_| {
            let ran = Call::run_in(self.root(), &["-i", "--template", "it"]).end_with(b"go\n");
            assert_eq!(ran.status, 0, "{ran}");
            println!("{}", ran.out());
            ran.out()
        };
        (0..CHILDREN).map(child).collect()
    }
}

/// Fails if two children say the same of one of these.
fn all_differ(said: &[String], names: &[&str]) {
    for name in names {
        let values: BTreeSet<&str> = said.iter().map(|said| field(said, name)).collect();
        assert_eq!(values.len(), said.len(), "{name}: {said:?}");
        assert!(!values.contains(""), "{name}: {said:?}");
    }
}

#[test]
fn node_draws_its_own_in_each_child() {
    const SCRIPT: &str = r#"
const net = require("net"), crypto = require("crypto"), fs = require("fs");
crypto.randomBytes(16);
crypto.randomUUID();
fs.writeFileSync("/reseed.node", Buffer.from("MODULE", "hex"));
const s = net.connect(process.env.VM_RUN_WARM, () => s.write("warm\n"));
s.once("data", () => {
    process.dlopen({ exports: {} }, "/reseed.node");
    console.log("bytes=" + crypto.randomBytes(16).toString("hex"));
    console.log("uuid=" + crypto.randomUUID({ disableEntropyCache: true }));
    console.log("int=" + crypto.randomInt(2 ** 47));
    crypto.generateKeyPair("ec", { namedCurve: "P-256" }, (error, key) => {
        console.log("key=" + key.export({ format: "der", type: "spki" }).toString("hex"));
        process.exit(error ? 1 : 0);
    });
});
"#;
    let module = std::fs::read(variable("VM_RUN_TEST_PROGRAMS").join("reseed.node"));
    let digits: Vec<String> = module
        .expect("is compiled")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let script = SCRIPT.replace("MODULE", &digits.concat());
    let line = serde_json::json!(["node", "-e", script]).to_string();
    let node = Workload::new("node");
    node.warms(&line, &[]);
    all_differ(&node.children_say(), &["bytes", "uuid", "int", "key"]);
}

/// A session that is open at the freeze would be the same in all children; one that is
/// opened later is not.
#[test]
fn postgres_draws_its_own_in_each_child() {
    const SCRIPT: &str = r#"
docker-entrypoint.sh postgres >/tmp/log 2>&1 &
until psql -U postgres -qtAc 'select 1' >/dev/null 2>&1; do sleep 1; done
mkfifo /tmp/in
psql -U postgres -qtA </tmp/in >/tmp/old 2>&1 &
exec 3>/tmp/in
echo "select 'old=' || gen_random_uuid();" >&3
until grep -q old= /tmp/old; do sleep 1; done
/run/vm-run/warm >/dev/null || exit 1
read go
echo 'select gen_random_uuid();' >&3
exec 3>&-
wait $!
psql -U postgres -qtA -c "select 'random=' || random()" -c "select 'uuid=' || gen_random_uuid()" \
    -c "select 'late=' || (now() > pg_postmaster_start_time())"
grep -c 'terminating connection' /tmp/old | sed 's/^/ended=/'
exit 0
"#;
    const HOOK: &str = r#"psql -U postgres -qc "select pg_terminate_backend(pid)
        from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()""#;
    let postgres = Workload::new("postgres");
    let sizes = ["-m", "512m", "--writable-memory", "256m"];
    let options = [&sizes[..], &["--post-fork", HOOK]].concat();
    postgres.warms(SCRIPT.trim(), &options);
    let said = postgres.children_say();
    all_differ(&said, &["random", "uuid"]);
    for said in &said {
        assert_eq!((field(said, "late"), field(said, "ended")), ("true", "1"));
    }
}
