//! What PID 1 of the guest is made of. `main.rs` tells the story of the boot;
//! the modules here each do one job of it:
//!
//! - [`mounts`], [`check`], [`devices`]: the guest itself, before the fork point;
//! - [`doorbell`], [`identity`]: the fork point and what a child becomes there;
//! - [`serve`]: the event loop over [`poll`], [`control`] with its [`frame`]s and
//!   [`streams`], and the [`container`] of [`process`]es that it serves;
//! - [`warm`], [`names`], [`freezer`]: what a warm container has beside;
//! - [`network`]: the guest's network, and that of a container without one;
//! - [`prepared`]: the container's first process, made before the fork point;
//! - [`spawn`], then in the new process [`report`], [`rootfs`], [`jail`], [`user`],
//!   [`exec`]: the way of a process of the container from the agent to its program;
//! - [`tasks`]: what the agent itself does in a container, as one more process of it.
//!
//! It is a library so that a test can run the loop and start containers over
//! any stream socket, without a virtual machine.
//!
//! One thread, no async runtime: the process forks, and a fork point wants few
//! pages. `unsafe` is in [`sys`] and [`doorbell`] alone.

pub mod check;
pub mod connections;
pub mod container;
pub mod control;
pub mod devices;
pub mod doorbell;
pub mod drawn;
pub mod exec;
pub mod frame;
pub mod freezer;
pub mod identity;
pub mod init;
pub mod jail;
pub mod mounts;
pub mod names;
pub mod network;
pub mod options;
pub mod poll;
pub mod prepared;
pub mod privileged;
pub mod process;
pub mod report;
pub mod rootfs;
pub mod serve;
pub mod spawn;
pub mod streams;
pub mod sys;
pub mod tasks;
pub mod user;
pub mod volumes;
pub mod warm;
