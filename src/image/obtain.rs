//! The image that a container is to have: from the store, or from its registry.

use super::error::ImageError;
use super::reference::Reference;
use super::registry::{Access, pull};
use super::store::{Image, Store};
use crate::progress::{Bar, Bars};
use anyhow::{Context, Result};

/// When a container's image is pulled: `run --pull`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PullPolicy {
    /// When it is not in the store
    #[default]
    Missing,
    /// Every time, for a newer one of the name
    Always,
    /// Never
    Never,
}

/// The image `wanted`, pulled if the policy says so.
///
/// # Errors
/// That there is none, here or in its registry, or what is wrong with it.
pub fn obtain(store: &Store, wanted: &str, policy: PullPolicy, access: &Access) -> Result<Image> {
    let fetch = || {
        let reference = Reference::parse(wanted)?;
        let (bars, bar) = (Bars::shown(), Bar::default());
        pull(store, &reference, access, (&bars, &bar))
    };
    if policy == PullPolicy::Always {
        fetch().with_context(|| format!("cannot pull {wanted}"))?;
    }
    match store.resolve(wanted) {
        Err(missing @ ImageError::NoSuchImage(_)) if policy == PullPolicy::Missing => {
            log::info!("{missing}");
            fetch().with_context(|| format!("no image {wanted} here, and none to pull"))?;
            Ok(store.resolve(wanted)?)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::archive::Input;
    use crate::image::changes::StartConfig;
    use crate::image::name::Name;
    use crate::image::store::Import;
    use crate::progress::Quiet;

    /// A registry's address where nobody listens.
    const NOBODY: &str = "127.0.0.1:1";

    #[test]
    fn the_policy_decides_whether_the_registry_is_asked() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let here = format!("{NOBODY}/here");
        let missing = format!("{NOBODY}/missing");
        let import = Import {
            config: StartConfig::default(),
            message: None,
            name: Some(Name::parse(&here).unwrap()),
        };
        let mut bytes = &[0; 1024][..];
        store
            .import(Input::Reader(&mut bytes), &import, &Quiet)
            .unwrap();
        let obtain = |image: &str, policy| {
            let image = obtain(&store, image, policy, &Access::default());
            image.map_err(|error| format!("{error:#}"))
        };
        for policy in [PullPolicy::Missing, PullPolicy::Never] {
            obtain(&here, policy).unwrap().open_rootfs().unwrap();
        }
        let error = obtain(&here, PullPolicy::Always).unwrap_err();
        assert!(error.contains("cannot pull") && error.contains("cannot reach"));
        let error = obtain(&missing, PullPolicy::Missing).unwrap_err();
        assert!(error.contains("none to pull") && error.contains("cannot reach"));
        let error = obtain(&missing, PullPolicy::Never).unwrap_err();
        assert!(error.starts_with("no such image"), "{error}");
    }
}
