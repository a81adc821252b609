//! What `run --check` warns of: files that a configuration names and that are not there, or are something else. The node says the same of each group, and starts
//! without it; so none of it is an error of the file.

use std::fs::{File, Metadata};
use std::os::unix::fs::FileTypeExt;

use crate::config::{Config, DiskConfig};
use crate::{hooks, script};

/// One line each.
pub(super) fn warnings(config: &Config) -> Vec<String> {
    let mut told = Vec::new();
    if let Some(receiver) = config.receiver.as_ref() {
        if receiver.clients.is_empty() {
            told.push("[receiver] has no [[receiver.client]]: nobody may send a copy to it".to_owned());
        }
        for client in &receiver.clients {
            let groups = client.group_space_max_bytes.iter().filter(|(_, bytes)| **bytes == 0);
            let groups = groups.map(|(group, _)| format!("{}/{group}", client.name));
            let all = (client.space_max_bytes == Some(0)).then(|| client.name.to_string());
            told.extend(all.into_iter().chain(groups).map(|of| format!("space_max of {of} is nothing: no epoch has room in it")));
        }
    }
    for group in &config.groups {
        for disk in &group.disks {
            told.extend(of_disk(disk).map(|problem| format!("group {}: disk {}: {problem}", group.name, disk.name)));
        }
    }
    for drill in &config.drills {
        if let Err(problem) = script::check(&drill.run) {
            told.push(format!("drill of {}: {} {problem}", drill.group, drill.run.display()));
        }
        if let Some(user) = drill.user.as_ref().filter(|user| script::User::named(user).is_none()) {
            told.push(format!("drill of {}: there is no user '{user}'", drill.group));
        }
    }
    for (hook, path) in config.hooks.all() {
        if let Err(problem) = hooks::check(path) {
            told.push(format!("hook {}: {} {problem}", hook.name(), path.display()));
        }
    }
    told
}

fn of_disk(disk: &DiskConfig) -> impl Iterator<Item = String> {
    let is_disk = |found: Metadata| found.is_file() || found.file_type().is_block_device();
    let image = match std::fs::metadata(&disk.path).map(is_disk) {
        Ok(true) => None,
        Ok(false) => Some(format!("{} is neither a raw image nor a block device", disk.path.display())),
        Err(error) => Some(format!("{}: {error}", disk.path.display())),
    };
    let tls = disk.tls.iter().flat_map(|tls| [Some(&tls.cert), Some(&tls.key), tls.client_ca.as_ref()]).flatten();
    let tls = tls.filter_map(|file| File::open(file).err().map(|error| format!("tls: {}: {error}", file.display())));
    image.into_iter().chain(tls)
}
