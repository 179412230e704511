"""First-party plugins. Installed as ``vswa_plugins`` and registered through the entry point group
``vswa_plugin``, like any third party's."""
