//! Containers in children of a Linux guest. These tests need a KVM that runs
//! Linux; `cargo xtask test` runs them on such a host, emulated if need be.

mod bad_input;
mod clock;
mod connections;
mod containers;
mod copy;
mod death;
mod differential;
mod docker;
mod health;
mod identity;
mod installed;
mod instants;
mod isolation;
mod kernel;
mod kills;
mod live;
mod live_cli;
mod live_networks;
mod live_tree;
mod machine;
mod network;
mod networks;
mod options;
mod pages;
mod root_window;
mod roots;
mod streams;
mod support;
mod twins;
mod volumes;
mod warm;
mod warm_cli;
mod workloads;
