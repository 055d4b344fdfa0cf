//! `-v` and `--mount`: docker's words for volumes.

use super::{Mount, Source};
use crate::container::new_id;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Component, Path, PathBuf};

/// What can be typed.
#[derive(Debug, Default, clap::Args)]
pub struct VolumeArgs {
    /// Mount a volume or a path of the host: [NAME|PATH:]TARGET[:ro]
    #[arg(short, long, value_name = "VOLUME")]
    volume: Vec<String>,
    /// The same in words: type=bind|volume,src=NAME|PATH,dst=TARGET[,readonly]
    #[arg(long, value_name = "WORDS")]
    mount: Vec<String>,
}

impl VolumeArgs {
    /// The option that was given, if one was.
    pub fn given(&self) -> Option<&'static str> {
        match (self.volume.is_empty(), self.mount.is_empty()) {
            (false, _) => Some("-v"),
            (_, false) => Some("--mount"),
            _ => None,
        }
    }
}

/// The mounts of a container: those that were asked for, and an anonymous volume for each
/// place that the image wants one for. Directories that `-v` names and that are not there
/// are made, as docker does.
///
/// # Errors
/// What is none, or too many.
pub fn plan(args: &VolumeArgs, of_image: &[String]) -> Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for text in &args.volume {
        mounts.push(short(text).with_context(|| format!("-v {text}"))?);
    }
    for text in &args.mount {
        mounts.push(words(text).with_context(|| format!("--mount {text}"))?);
    }
    for (nth, mount) in mounts.iter().enumerate() {
        let twice = mounts[..nth].iter().any(|m| m.target == mount.target);
        ensure!(!twice, "two volumes are to be mounted on {}", mount.target);
    }
    for target in of_image {
        let target = absolute(target).context("the image's volume")?;
        if !mounts.iter().any(|mount| mount.target == target) {
            mounts.push(anonymous(target)?);
        }
    }
    ensure!(
        mounts.len() <= fork::VOLUMES_MAX,
        "a container has at most {} volumes, and this one would have {}",
        fork::VOLUMES_MAX,
        mounts.len()
    );
    for mount in &mounts[..args.volume.len()] {
        if let Source::Bind(path) = &mount.source
            && !path.exists()
        {
            std::fs::create_dir_all(path)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
    }
    Ok(mounts)
}

fn anonymous(target: String) -> Result<Mount> {
    Ok(Mount {
        source: Source::Volume {
            name: new_id()?,
            copy_up: true,
        },
        target,
        read_only: false,
    })
}

/// `[NAME|PATH:]TARGET[:OPTIONS]`
fn short(text: &str) -> Result<Mount> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => return anonymous(absolute(target)?),
        [source, target] => (source, target, ""),
        [source, target, options] => (source, target, options),
        _ => bail!("a volume is [NAME|PATH:]TARGET[:ro]"),
    };
    let (mut read_only, mut copy_up) = (false, true);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            "nocopy" => copy_up = false,
            // Of other hosts' file systems and labels: nothing to do.
            "z" | "Z" | "cached" | "delegated" | "consistent" | "private" | "rprivate" => {}
            other => bail!("{other:?} is no option of a volume: it has ro, rw, nocopy"),
        }
    }
    let source = if source.starts_with(['/', '.']) {
        Source::Bind(host_path(source)?)
    } else {
        named(source, copy_up)?
    };
    Ok(Mount {
        source,
        target: absolute(target)?,
        read_only,
    })
}

/// `type=T,src=S,dst=D,readonly`
fn words(text: &str) -> Result<Mount> {
    let (mut kind, mut source, mut target) = ("volume", None, None);
    let (mut read_only, mut copy_up) = (false, true);
    for word in text.split(',') {
        let (name, value) = word
            .split_once('=')
            .map_or((word, None), |(name, value)| (name, Some(value)));
        match (name, value) {
            ("type", Some(value)) => kind = value,
            ("source" | "src", Some(value)) => source = Some(value),
            ("target" | "dst" | "destination", Some(value)) => target = Some(value),
            ("readonly" | "ro", value) => read_only = is_true(value)?,
            ("volume-nocopy", value) => copy_up = !is_true(value)?,
            ("bind-propagation", Some("private" | "rprivate")) | ("consistency", Some(_)) => {}
            _ => bail!("{word:?} is no word of a mount: it has type, src, dst, readonly"),
        }
    }
    let target = absolute(target.context("there is no dst")?)?;
    let source = match (kind, source) {
        ("bind", Some(source)) => {
            let path = host_path(source)?;
            ensure!(path.exists(), "{} is not there", path.display());
            Source::Bind(path)
        }
        ("bind", None) => bail!("a bind needs a src"),
        ("volume", Some(name)) => named(name, copy_up)?,
        ("volume", None) => Source::Volume {
            name: new_id()?,
            copy_up,
        },
        _ => bail!("{kind:?}: a mount is of the type bind or volume"),
    };
    Ok(Mount {
        source,
        target,
        read_only,
    })
}

fn is_true(value: Option<&str>) -> Result<bool> {
    match value {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => bail!("{other:?} is neither true nor false"),
    }
}

fn named(name: &str, copy_up: bool) -> Result<Source> {
    super::store::check_name(name)?;
    Ok(Source::Volume {
        name: name.to_owned(),
        copy_up,
    })
}

/// A path of the host; what begins with a dot is below the working directory.
fn host_path(text: &str) -> Result<PathBuf> {
    std::path::absolute(text).with_context(|| format!("{text:?} is no path"))
}

/// A path of the container without detours, and not its root or what is the kernel's.
fn absolute(text: &str) -> Result<String> {
    let path = Path::new(text);
    ensure!(path.is_absolute(), "{text:?} does not begin with /");
    let mut names: Vec<&str> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_str().context("no text")?),
            Component::ParentDir => drop(names.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    match names.first() {
        None => bail!("a volume cannot be the root of a container"),
        Some(&"proc") => bail!("a volume cannot lie in /proc"),
        Some(_) => Ok(format!("/{}", names.join("/"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(volumes: &[&str], mounts: &[&str], of_image: &[&str]) -> Result<Vec<Mount>> {
        let own = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let args = VolumeArgs {
            volume: own(volumes),
            mount: own(mounts),
        };
        let of_image: Vec<String> = own(of_image);
        plan(&args, &of_image)
    }

    #[test]
    fn both_notations_say_the_same() {
        for (short, long) in [
            ("data:/v", "src=data,dst=/v"),
            ("data:/v:ro", "type=volume,source=data,target=/v,readonly"),
            ("data:/v:nocopy", "src=data,dst=/v,volume-nocopy=true"),
            (
                "/etc:/a/../v/.:rw",
                "type=bind,src=/etc,destination=/v,ro=false",
            ),
            (
                "/etc/passwd:/v:ro,z",
                "type=bind,src=/etc/passwd,dst=/v,ro=1",
            ),
        ] {
            let one = planned(&[short], &[], &[]).expect(short);
            assert_eq!(one, planned(&[], &[long], &[]).expect(long));
            assert_eq!(one[0].target, "/v");
        }
    }

    #[test]
    fn what_docker_refuses_is_refused_in_one_line() {
        for (short, says) in [
            ("data:v", "does not begin with /"),
            ("v", "does not begin with /"),
            ("data:/", "root of a container"),
            ("data:/a/..", "root of a container"),
            ("data:/proc/self", "/proc"),
            ("data:/v:shared", "no option"),
            ("a:/b:ro:x", "a volume is"),
            ("../x/../../a b/:/v:zz", "no option"),
            ("a/b:/v", "no name of a volume"),
            (":/v", "no name of a volume"),
        ] {
            let error = planned(&[short], &[], &[]).expect_err(short);
            let text = crate::line(&error);
            assert!(text.contains(says) && !text.contains('\n'), "{text}");
        }
        for (long, says) in [
            ("type=bind,dst=/v", "needs a src"),
            ("src=data", "no dst"),
            ("type=bind,src=/no/such/path,dst=/v", "is not there"),
            ("type=tmpfs,dst=/v", "bind or volume"),
            ("type=volume,src=a,dst=/v,colour=blue", "no word"),
            ("src=a,dst=/v,readonly=maybe", "neither"),
        ] {
            let error = planned(&[], &[long], &[]).expect_err(long);
            let text = crate::line(&error);
            assert!(text.contains(says) && !text.contains('\n'), "{text}");
        }
        let twice = planned(&["data:/v"], &["src=more,dst=/v/"], &[]).expect_err("twice");
        assert!(crate::line(&twice).contains("/v"), "{twice:#}");
        let many: Vec<String> = (0..=fork::VOLUMES_MAX)
            .map(|n| format!("data:/v{n}"))
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let error = crate::line(&planned(&many, &[], &[]).expect_err("too many"));
        assert!(error.contains("at most 64 volumes"), "{error}");
    }

    #[test]
    fn an_images_volumes_are_anonymous_where_nothing_else_is_asked_for() {
        let mounts = planned(&["data:/data", "/anonymous"], &[], &["/data/", "/log"]);
        let mounts = mounts.expect("planned");
        let targets: Vec<_> = mounts.iter().map(|mount| &*mount.target).collect();
        assert_eq!(targets, ["/data", "/anonymous", "/log"]);
        for mount in &mounts[1..] {
            let Source::Volume { name, copy_up } = &mount.source else {
                panic!("{mount:?}");
            };
            assert!(
                *copy_up && crate::volume::store::is_anonymous(name),
                "{name}"
            );
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_made_for_v() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = dir.path().join("a/b");
        planned(&[&format!("{}:/v", missing.display())], &[], &[]).expect("planned");
        assert!(missing.is_dir());
    }
}
