//! What the agent does in a container by itself: see [`vm_run_abi::task`].

use super::{Child, Phase, Process};
use crate::error::Error;
use crate::template::Kind;
use vm_run_abi::protocol::{CONTAINER, ContainerSpec, Request, Stream};
use vm_run_abi::task::Task;

impl Child {
    /// In the place of [`Self::start`]: mounts the container's file systems, and runs no
    /// program in it; it stays until it is killed. For tasks on a container that is at
    /// rest.
    ///
    /// # Errors
    /// A child that has a container, or file systems that cannot be mounted.
    pub fn open(&mut self, mut container: ContainerSpec) -> Result<Process, Error> {
        self.expect_fresh(Kind::Bare, "has a container inside, which is open already")?;
        self.complete(&mut container);
        let request = Request::OpenContainer { container };
        let result = self.begin(CONTAINER, &[], &request, 2);
        self.settle(result, Phase::Started)
    }

    /// Has the agent do something in the container: a process as by [`Self::exec`], with
    /// these streams; no terminal.
    ///
    /// # Errors
    /// A process that cannot be made; the container runs on.
    pub fn task(&mut self, task: Task, streams: &[Stream]) -> Result<Process, Error> {
        self.expect(Phase::Started, "has no container to do it in")?;
        let id = self.next_process;
        self.next_process += 1;
        let request = Request::Task {
            id,
            task,
            streams: streams.to_vec(),
        };
        match self.begin(id, streams, &request, 2) {
            Err(error @ (Error::Start { .. } | Error::TooLong { .. })) => Err(error),
            other => self.settle(other, Phase::Started),
        }
    }
}
