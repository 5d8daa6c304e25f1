//! `xl vne-snapshot import`.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::show::describe;
use super::{print, print_json, Failure, Host, StoreArgument};
use crate::image::{
    host_key, DomainType, Downtime, Manifest, Member, MemberWriter, Name, Take, WriterOptions,
};
use crate::sentence::sentence;
use crate::stream::{Ingest, SaveHeader};

/// Make a snapshot of files that 'xl save' has written, a member each.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The VNE that it's going to be a snapshot of
    vne: Name,
    /// The files; members are called as the domains in them
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// A word of your own about this snapshot
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Print the snapshot's manifest as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgument,
}

/// What has to be known of a domain, out of libxl's JSON.
#[derive(serde::Deserialize)]
struct Config {
    c_info: CreateInfo,
    b_info: BuildInfo,
}

#[derive(serde::Deserialize)]
struct CreateInfo {
    name: String,
    #[serde(default)]
    uuid: String,
    #[serde(rename = "type")]
    domain_type: Option<DomainType>,
}

#[derive(serde::Deserialize)]
struct BuildInfo {
    #[serde(rename = "type")]
    domain_type: Option<DomainType>,
    #[serde(default)]
    max_vcpus: u32,
    #[serde(default)]
    max_memkb: u64,
}

/// Runs the verb.
pub fn run(host: &Host, arguments: &Arguments) -> Result<(), Failure> {
    let here = host.name()?;
    let root = arguments.store.resolve(host, Some(&arguments.vne))?;
    let store = crate::image::Store::open(&root)?;
    let mut take = store.begin(&arguments.vne)?;
    let mut manifest = take.manifest(&here);
    manifest.label.clone_from(&arguments.label);
    manifest.tool_version = String::from(env!("CARGO_PKG_VERSION"));
    manifest.take = format!("{:016x}", crate::random::number()?);
    for file in &arguments.files {
        let member = import(&take, file, &here)
            .map_err(|error| format!("{}: {}", file.display(), sentence(error.as_ref())))?;
        if manifest
            .members
            .iter()
            .any(|other| other.name == member.name)
        {
            let name = member.name;
            return Err(format!("{}: there are two of domain {name}", file.display()).into());
        }
        manifest.members.push(member);
    }
    manifest.cut.at_ns = vec![0; manifest.members.len()];
    take.commit(&manifest)?;
    print_made(&manifest, arguments.json)
}

fn print_made(manifest: &Manifest, json: bool) -> Result<(), Failure> {
    match json {
        true => print_json(manifest),
        false => print(&describe(manifest, None)),
    }
}

fn import(take: &Take, path: &Path, here: &Name) -> Result<Member, Failure> {
    let mut file = File::open(path)?;
    let header = SaveHeader::read(&mut file)?;
    let json = header
        .config_json
        .ok_or("it has no configuration, so the domain's name can't be told")?;
    let config: Config = serde_json::from_str(&json)?;
    let name = Name::new(&config.c_info.name)?;
    let options = WriterOptions {
        key: host_key()?,
        ..WriterOptions::default()
    };
    let mut writer = MemberWriter::create(take.dir(), &name, &options)?;
    let summary = Ingest::new(file).run(&mut writer)?;
    let image = writer.finish(&json)?;
    let domain_type = config.b_info.domain_type.or(config.c_info.domain_type);
    Ok(Member {
        name,
        domid: 0,
        uuid: config.c_info.uuid,
        host: here.clone(),
        domain_type: domain_type.ok_or("its configuration doesn't say of what type it is")?,
        memory_kib: config.b_info.max_memkb,
        vcpus: config.b_info.max_vcpus,
        ran_on: None,
        downtime: Downtime::default(),
        rounds: 1,
        pages_sent: summary.pages,
        pages_final_dirty: 0,
        stream_bytes: summary.bytes,
        diverged: false,
        throttled_to: None,
        uncaptured_disks: Vec::new(),
        read_only_disks: Vec::new(),
        disks: Vec::new(),
        late_frames: 0,
        recorded: None,
        timeline: None,
        image,
    })
}
