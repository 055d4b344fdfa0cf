//! A worker's user, and no privilege.

use super::Error;
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// Becomes the user and group `uid`, with no capability and no way to one.
///
/// The calls set what belongs to this thread, which is the only one.
pub(super) fn drop_all(uid: u32) -> Result<(), Error> {
    reduce_bounding_set(CapabilitySet::empty())?;
    clear_ambient_capability_set().map_err(Error::call("PR_CAP_AMBIENT_CLEAR_ALL"))?;
    // No uid 0, should it ever come back, brings capabilities (capabilities(7),
    // "The securebits flags").
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(Error::call("PR_SET_SECUREBITS"))?;

    set_thread_groups(&[]).map_err(Error::call("setgroups"))?;
    let gid = Gid::from_raw(uid);
    set_thread_res_gid(gid, gid, gid).map_err(Error::call("setresgid"))?;
    let uid = Uid::from_raw(uid);
    set_thread_res_uid(uid, uid, uid).map_err(Error::call("setresuid"))?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    set_capabilities(None, none).map_err(Error::call("capset"))?;

    // No ptrace(2) by others of the uid, and /proc/PID belongs to root, which may
    // still read it for statistics (proc(5)).
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::call("PR_SET_DUMPABLE"))?;
    no_new()
}

/// What a server of files of many owners needs, and nothing that is more than files: it
/// reads, writes and makes them whoever owns them, gives them owners and modes, sets file
/// capabilities, and acts as another user for what it makes. No device nodes (MKNOD).
const OVER_FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// Stays root by its uid, with no capability but [`OVER_FILES`], which do not change with
/// the user that it acts as.
pub(super) fn keep_files() -> Result<(), Error> {
    reduce_bounding_set(OVER_FILES)?;
    clear_ambient_capability_set().map_err(Error::call("PR_CAP_AMBIENT_CLEAR_ALL"))?;
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(Error::call("PR_SET_SECUREBITS"))?;
    set_thread_groups(&[]).map_err(Error::call("setgroups"))?;
    let sets = CapabilitySets {
        effective: OVER_FILES,
        permitted: OVER_FILES,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(Error::call("capset"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::call("PR_SET_DUMPABLE"))?;
    no_new()
}

/// What this process executes never has more privileges than it.
pub(super) fn no_new() -> Result<(), Error> {
    set_no_new_privs(true).map_err(Error::call("PR_SET_NO_NEW_PRIVS"))
}

/// Takes all capabilities but `kept` out of reach.
///
/// Capabilities are numbered from 0 without a hole; the first that is not known ends
/// the list (PR_CAPBSET_DROP(2const): EINVAL).
fn reduce_bounding_set(kept: CapabilitySet) -> Result<(), Error> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(Error::call("PR_CAPBSET_DROP")(errno)),
        }
    }
    Ok(())
}
