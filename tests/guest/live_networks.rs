//! Containers on networks that are forked while they run.

use crate::networks::{does, http, inspect, starts, until};
use crate::support::own_root;

/// Serves, and keeps a connection to `peer` open: what is put into /to comes back in /from.
const SCRIPT: &str = "mkdir /www; echo served > /www/index.html; mkfifo /to
    httpd -p 80 -h /www
    until echo there | nc -w 5 peer 7000 | grep -q there; do sleep 1; done
    sleep 100000 > /to & nc peer 7000 < /to > /from & exec sleep 100000";

#[test]
fn a_fork_is_on_the_same_networks_and_its_connections_are_its_sources() {
    let own = own_root();
    let root = own.path();
    does(root, &["network", "create", "app"]);
    let on_app = ["--network", "app", "--name"];
    let echo = ["peer", "busybox", "nc", "-ll", "-p", "7000", "-e", "cat"];
    starts(root, &[&on_app[..], &echo].concat());
    let published = ["source", "-p", "28080:80", "busybox", "sh", "-c", SCRIPT];
    starts(root, &[&on_app[..], &published].concat());
    let sh = |name: &str, script: &str| does(root, &["exec", name, "sh", "-c", script]);
    // Echoes a word, by the connection that was open all the time.
    let echoes = |name: &str, word: &str| {
        sh(name, &format!("echo {word} > /to"));
        until("it is not echoed", || sh(name, "tail -n 1 /from") == word);
    };
    until("it is not published", || {
        http("127.0.0.1:28080") == "served\n"
    });
    echoes("source", "before");
    does(
        root,
        &["fork", "--name", "fork", "-p", "28081:80", "source"],
    );
    does(root, &["fork", "--name", "other", "source"]);
    let place = |name: &str| inspect(root, &["inspect", name])["NetworkSettings"].clone();
    let address = |name: &str| place(name)["Networks"]["app"]["IPAddress"].to_string();
    let all = ["source", "fork", "other"].map(address);
    assert!(all.iter().all(|one| one.len() > 4), "{all:?}");
    assert!(
        all[0] != all[1] && all[1] != all[2] && all[0] != all[2],
        "{all:?}"
    );
    // Each by its name, and by the ports that it was given.
    for name in ["source", "fork", "other"] {
        let script = format!("wget -q -O - http://{name}/");
        until("it does not serve", || sh("peer", &script) == "served");
    }
    assert_eq!(http("127.0.0.1:28081"), "served\n");
    assert_eq!(
        does(root, &["port", "fork"]),
        "80/tcp -> 0.0.0.0:28081\n80/tcp -> [::]:28081"
    );
    assert_eq!(does(root, &["port", "other"]), "");
    // The connection goes on where it was, and its copies are told that they are none. Who
    // has ended so waits for its parent, and has no command line.
    for name in ["fork", "other"] {
        until("nothing is reset", || {
            sh(name, "ps | grep '[n]c peer' || echo none") == "none"
        });
    }
    assert_eq!(http("127.0.0.1:28080"), "served\n");
    echoes("source", "after");
    assert_eq!(sh("other", "cat /from"), "before");
    does(root, &["rm", "-f", "source", "fork", "other", "peer"]);
    does(root, &["network", "rm", "app"]);
}
