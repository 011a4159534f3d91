"""Every promise that is checked, in the order in which it is: what lies on disk before anything is opened."""

from __future__ import annotations

from service.doctor import commands, database, deployment, files, host, log, network, processes
from service.doctor.check import Check

CHECKS = (
    Check("home", "The home is its owner's alone.", files.look_at_home),
    Check("secrets", "Secrets are whole, and their owner's alone.", files.look_at_secrets),
    Check("log files", "Logs are their owner's alone.", files.look_at_logs),
    Check("database files", "Data and socket are Postgres's alone.", files.look_at_database_files),
    Check(
        "model", "The model is safetensors, no program, and nobody else's to write.", deployment.look_at_model
    ),
    Check("signature", "The model is as its signer signed it.", commands.look_at_signature),
    Check("not root", "No gateway is root.", host.look_at_user),
    Check("seccomp", "The kernel can end a process for a system call.", host.look_at_seccomp),
    Check("landlock", "The kernel can shut files, TCP and signals.", host.look_at_landlock),
    Check("namespaces", "The kernel has user namespaces, where they are needed.", host.look_at_namespaces),
    Check("open files", "A gateway may open enough files.", host.look_at_open_files),
    Check("disk", "There is room for the log and the database.", host.look_at_disk),
    Check("unit", "The unit is hardened.", deployment.look_at_unit),
    Check("reach", "Keys cross a network under TLS alone.", network.look_at_reach),
    Check("service", "The service is ready.", network.look_at_service),
    Check("certificates", "TLS certificates are valid, and in use.", network.look_at_certificates),
    Check("detectors", "Every detector is active.", network.look_at_detectors),
    Check("core dumps", "No process leaves a core dump.", processes.look_at_core_dumps),
    Check("memory", "No other process of its user reads a process's memory.", processes.look_at_memory),
    Check("arguments", "No argument list holds a secret.", processes.look_at_arguments),
    Check("children", "Children have no way to more privileges.", processes.look_at_children),
    Check("users", "Children of a gateway that is root are not.", processes.look_at_users),
    Check("confinement", "Every measure of confinement holds.", processes.look_at_locks),
    Check("schema", "The schema is this version's.", database.look_at_schema),
    Check("role", "The runtime role is neither owner nor superuser.", database.look_at_role),
    Check("row security", "Row security is forced on every table.", database.look_at_rows),
    Check("durability", "What is committed lasts, and rot is found.", database.look_at_durability),
    Check("statements", "Postgres logs no statement and no value.", database.look_at_statements),
    Check("connection", "Nobody reads along on the way to the database.", database.look_at_connection),
    Check("clock", "The database's clock and this host's agree.", database.look_at_clock),
    Check("log tree", "The log's tree leads to the root that was signed.", log.look_at_tree),
    Check("log lag", "Entries are in the tree within 5 s.", log.look_at_lag),
    Check("witnesses", "Somebody else cosigns the log's checkpoints.", log.look_at_witnesses),
    Check("backup store", "Backups are nobody else's to write.", files.look_at_backup_store),
    Check("backups", "There is a new backup, and one that was read back.", database.look_at_backups),
    Check("alerts", "Alerts go to somebody, and their absence is noticed.", commands.look_at_alerts),
)
