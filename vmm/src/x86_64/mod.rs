//! What is x86-64 about a machine of ours: tables, registers, CPUID, MSRs.

pub(crate) mod boot;
pub(crate) mod cpuid;
pub(crate) mod mptable;
pub(crate) mod msr;
